"""Duplicates: near-copies within a selection, and rows that an evaluation file already holds.

Both compare word n-grams: near-copies share at least 0.8 of their 5-grams (Jaccard), and a row is
contaminated when it shares a 13-gram with an evaluation text. Texts shorter than the n-gram are
one gram.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from sae_ray.chat import Conversation

_WORD = re.compile(r"\w+")

SHINGLE_WORDS = 5
CONTAMINATION_WORDS = 13


def grams(text: str, n: int) -> frozenset[str]:
    """Return the distinct word n-grams of a text, in lower case; of a short text, all of it."""
    words = _WORD.findall(text.lower())
    if len(words) < n:
        return frozenset([" ".join(words)] if words else [])
    return frozenset(" ".join(words[i : i + n]) for i in range(len(words) - n + 1))


class NearDuplicates:
    """Texts let in so far; says whether a new one nearly copies one of them."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self._sizes: list[int] = []
        self._holders: defaultdict[str, list[int]] = defaultdict(list)

    def admit(self, text: str) -> bool:
        """Let a text in unless it nearly copies one that is in."""
        mine = grams(text, SHINGLE_WORDS)
        shared = Counter(i for gram in mine for i in self._holders.get(gram, ()))
        for i, both in shared.items():
            if both / (len(mine) + self._sizes[i] - both) >= self.threshold:
                return False
        for gram in mine:
            self._holders[gram].append(len(self._sizes))
        self._sizes.append(len(mine))
        return True


def contaminated(
    conversations: Sequence[Conversation], evaluation: Mapping[str, Iterable[str]]
) -> dict[str, list[str]]:
    """Return for each evaluation file the ids of conversations that share a 13-gram with it.

    Args:
        conversations: rows that were selected.
        evaluation: name of a file -> its texts.
    """
    mine = [(one.id, grams(one.text(), CONTAMINATION_WORDS)) for one in conversations]
    found: dict[str, list[str]] = {}
    for name, texts in evaluation.items():
        theirs = frozenset().union(*(grams(text, CONTAMINATION_WORDS) for text in texts))
        found[name] = [id_ for id_, own in mine if not theirs.isdisjoint(own)]
    return found
