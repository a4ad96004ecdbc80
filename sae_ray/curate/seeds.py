"""Seeds: a description's words, and the first rows that they find, with weights.

Seed purity decides everything that follows: with twenty right rows every representation of them
finds the rest.
"""

import dataclasses
import re

import numpy as np
from jaxtyping import Float32, Float64, Int64

_WORD = re.compile(r"[^\W_]+")

_STOP_TEXT = """
a an and any are as at be been but by can could did do does for from had has have how i if in into
is it its just me my no not of on or our so some such than that the their them then there these they
this to up us was we were what when where which while who whom why will with would you your
"""
STOP_WORDS = frozenset(_STOP_TEXT.split())

_SPELLINGS = (("ise", "ize"), ("isi", "izi"), ("isa", "iza"), ("yse", "yze"), ("our", "or"))


@dataclasses.dataclass(frozen=True)
class Seeds:
    """Rows of the pool, heaviest first; weights sum to 1, or there are none."""

    rows: Int64[np.ndarray, " n"]
    weights: Float64[np.ndarray, " n"]

    @property
    def effective(self) -> float:
        """How many rows of equal weight would count as much."""
        return float(1 / np.square(self.weights).sum()) if len(self.rows) else 0.0


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


def strongest(scores: Float32[np.ndarray, " num_rows"], num_seeds: int, sharpness: float) -> Seeds:
    """Return the rows of highest positive score, weighted by score ** sharpness."""
    order = np.argsort(-scores, kind="stable")[:num_seeds]
    order = order[scores[order] > 0]
    weights = scores[order].astype(np.float64) ** sharpness
    return Seeds(order.astype(np.int64), weights / max(weights.sum(), 1e-300))
