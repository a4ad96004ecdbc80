"""Seeds: a description's words, and the first rows that they find, with weights.

Seed purity decides everything that follows: with twenty right rows every representation of them
finds the rest.
"""

import dataclasses
import re

import numpy as np
from jaxtyping import Float32, Float64, Int64

_WORD = re.compile(r"[^\W_]+")

_STOP_WORDS = (
    "a an and any are as at be been but by can could did do does for from had has have how i if in "
    "into is it its just me my no not of on or our so some such than that the their them then "
    "there these they this to up us was we were what when where which while who whom why will with "
    "would you your"
)
STOP_WORDS = frozenset(_STOP_WORDS.split())
_LEARNER_WORDS = (
    "ability able assistant become better capable get good help improve know learn like make model "
    "skill skilled task train understand use using want"
)
LEARNER_WORDS = frozenset(_LEARNER_WORDS.split())
"""Words of a description that speak of the learner and not of the data."""

_SPELLINGS = (("ise", "ize"), ("isi", "izi"), ("isa", "iza"), ("yse", "yze"), ("our", "or"))


@dataclasses.dataclass(frozen=True)
class Seeds:
    """Rows of the pool, heaviest first; weights sum to 1, or there are none."""

    rows: Int64[np.ndarray, " n"]
    weights: Float64[np.ndarray, " n"]


def query_terms(text: str) -> list[str]:
    """Return the words of a text without stop words: lower case, sorted, each once."""
    return sorted(set(_WORD.findall(text.lower())) - STOP_WORDS)


def spellings(term: str) -> list[str]:
    """Return a word with its other spellings: British, American, plural of an abbreviation."""
    found = {term}
    head, tail = term[:2], term[2:]
    for british, american in _SPELLINGS:
        if british in tail:
            found.add(head + tail.replace(british, american))
        if american in tail and american != "or":
            found.add(head + tail.replace(american, british))
    if term.endswith("s") and len(term) > 4:
        found.add(term[:-1])
    return sorted(found)


def task_terms(text: str) -> list[str]:
    """Return a description's words about the data; all of its words if there are none."""
    terms = query_terms(text)
    return [term for term in terms if term not in LEARNER_WORDS] or terms


def strongest(
    scores: Float32[np.ndarray, " num_rows"],
    num_seeds: int,
    sharpness: float,
    sample: Int64[np.ndarray, " m"] | None = None,
) -> Seeds:
    """Return the rows of highest positive score, weighted by score ** sharpness.

    The rows below them are too many to read but together say which *kind* of row the words mean:
    those of an even sample stand for them, each for num_rows / m rows.
    """
    order = np.argsort(-scores, kind="stable")[:num_seeds]
    rows = order[scores[order] > 0].astype(np.int64)
    stands_for = np.ones(len(rows))
    if sample is not None:
        others = np.setdiff1d(sample, rows)
        others = others[scores[others] > 0]
        each = max(len(scores) - num_seeds, 0) / max(len(sample), 1)
        rows = np.concatenate([rows, others]).astype(np.int64)
        stands_for = np.concatenate([stands_for, np.full(len(others), each)])
    weights = stands_for * (scores[rows] / max(float(scores.max()), 1e-30)) ** sharpness
    return Seeds(rows, weights / max(weights.sum(), 1e-300))
