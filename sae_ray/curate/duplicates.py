"""Duplicates: near-copies within a selection, and rows that an evaluation file already holds.

Both compare word n-grams. Near-copies share at least 0.9 of their 5-grams (Jaccard), and a text
shorter than that is one gram. A row is contaminated when it shares a 13-gram with a conversation
of an evaluation file, or asks a shorter question of 5 words or more word for word.
"""

import re
from array import array
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from sae_ray.chat import Conversation

_WORD = re.compile(r"\w+")

NEAR_COPY = 0.9
SHINGLE_WORDS = 5
CONTAMINATION_WORDS = 13
QUESTION_WORDS = 5
"""Shorter questions are too common to say where a row is from."""


def grams(text: str, n: int) -> frozenset[str]:
    """Return the distinct word n-grams of a text, in lower case; of a short text, all of it."""
    words = _WORD.findall(text.lower())
    if len(words) < n:
        return frozenset([" ".join(words)] if words else [])
    return frozenset(" ".join(words[i : i + n]) for i in range(len(words) - n + 1))


class NearDuplicates:
    """Texts let in so far; says whether a new one nearly copies one of them."""

    def __init__(self, threshold: float = NEAR_COPY) -> None:
        self.threshold = threshold
        self._sizes = array("q")
        self._holders: defaultdict[str, array[int]] = defaultdict(lambda: array("q"))

    def admit(self, text: str) -> bool:
        """Let a text in unless it nearly copies one that is in."""
        mine = grams(text, SHINGLE_WORDS)
        if holders := [np.array(self._holders[gram]) for gram in mine if gram in self._holders]:
            both = np.bincount(np.concatenate(holders), minlength=len(self._sizes))
            either = len(mine) + np.array(self._sizes) - both
            if (both / either >= self.threshold).any():
                return False
        for gram in mine:
            self._holders[gram].append(len(self._sizes))
        self._sizes.append(len(mine))
        return True


def num_copies(texts: Iterable[str]) -> int:
    """Return how many texts nearly copy an earlier one that copies none."""
    seen = NearDuplicates()
    return sum(not seen.admit(text) for text in texts)


def contaminated(
    conversations: Sequence[Conversation], evaluation: Mapping[str, Iterable[Conversation]]
) -> dict[str, list[str]]:
    """Return for each evaluation file the ids of conversations that it holds a piece of.

    Args:
        conversations: rows that were selected.
        evaluation: name of a file -> its conversations.
    """
    mine = [(one.id, _fingerprints(one)) for one in conversations]
    found: dict[str, list[str]] = {}
    for name, others in evaluation.items():
        theirs = frozenset().union(*map(_fingerprints, others))
        found[name] = [id_ for id_, own in mine if not theirs.isdisjoint(own)]
    return found


def _fingerprints(conversation: Conversation) -> frozenset[str]:
    """Return a conversation's 13-grams, and its questions that are shorter."""
    questions = [m["content"] for m in conversation.messages if m["role"] == "user"]
    short = [gram for one in questions for gram in grams(one, CONTAMINATION_WORDS)]
    return grams(conversation.text(), CONTAMINATION_WORDS).union(
        gram for gram in short if gram.count(" ") >= QUESTION_WORDS - 1
    )
