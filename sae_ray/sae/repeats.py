"""Repeats: conversations that share twenty words on end with one that was kept before them.

The paper's rule goes through the pool in order and drops a conversation if any n-gram of any of
its turns was seen in one that was kept. What is left then depends on the order of the rows; going
by a hash of the content instead gives the same conversations in any order of the pool.

n-grams are words in lower case within one turn; the paper leaves open whether words or characters
are meant. A turn of fewer words has no n-gram, so short turns ("thank you") repeat nothing.

Source: FAST, arXiv 2506.07691, 3.1 and appendix B.
"""

import dataclasses
import functools
import hashlib
import re
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int64, UInt64

GRAM_WORDS = 20

Order = Literal["rows", "content"]
"""Who comes first: the earlier row, as in the paper, or the smaller hash of the content."""

_WORD = re.compile(r"\w+")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


@dataclasses.dataclass(frozen=True)
class Grams:
    """Which row holds which n-gram, each pair once."""

    grams: UInt64[np.ndarray, " pairs"]
    """Hashes."""
    rows: Int64[np.ndarray, " pairs"]
    ranks: UInt64[np.ndarray, " pairs"]
    """Hash of the content of the whole row."""

    @classmethod
    def of(cls, texts: Iterable[tuple[int, Sequence[str]]], num_words: int = GRAM_WORDS) -> "Grams":
        """Take the n-grams of rows, given as (number of the row, its turns)."""
        parts = [cls(*(np.empty(0, dtype) for dtype in (np.uint64, np.int64, np.uint64)))]
        for row, turns in texts:
            found = np.unique(np.concatenate([_hashes(turn, num_words) for turn in turns]))
            rank = np.uint64(_digest("\x00".join(turns)))
            parts.append(cls(found, np.full(len(found), row), np.full(len(found), rank)))
        return cls.joined(parts)

    @classmethod
    def joined(cls, parts: Sequence["Grams"]) -> "Grams":
        """Put parts of a pool together."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(*(np.concatenate([getattr(p, name) for p in parts]) for name in names))

    def shared(self) -> "Grams":
        """Leave out n-grams of one row alone: they drop nothing."""
        _, place, count = np.unique(self.grams, return_inverse=True, return_counts=True)
        return self._where(count[place] > 1)

    def repeats(self, order: Order) -> list[int]:
        """Return the rows to drop, smallest first."""
        held = self.shared()
        key = held.rows if order == "rows" else held.ranks
        by_turn = np.lexsort([held.rows, key])
        held = held._where(by_turn)
        _, gram = np.unique(held.grams, return_inverse=True)
        begins = np.flatnonzero(np.diff(held.rows, prepend=-1))
        seen = np.zeros(len(gram), dtype=bool)
        dropped: list[int] = []
        for pairs in np.split(np.arange(len(gram)), begins[1:]):
            if seen[gram[pairs]].any():
                dropped.append(int(held.rows[pairs[0]]))
            else:
                seen[gram[pairs]] = True
        return sorted(dropped)

    def _where(self, chosen: Bool[np.ndarray, " pairs"] | Int64[np.ndarray, " kept"]) -> "Grams":
        return Grams(self.grams[chosen], self.rows[chosen], self.ranks[chosen])


def _hashes(text: str, num_words: int) -> UInt64[np.ndarray, " grams"]:
    """Hash every run of words: sum of word hash times a power of an odd number, modulo 2^64."""
    words = np.array([_hash(word) for word in _WORD.findall(text.lower())], dtype=np.uint64)
    num = max(0, len(words) - num_words + 1)
    total = np.zeros(num, dtype=np.uint64)
    for at in range(num_words if num else 0):
        total = total * _FACTOR + words[at : at + num]
    return total


@functools.lru_cache(maxsize=2**17)
def _hash(word: str) -> int:
    return _digest(word)


def _digest(text: str) -> int:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")
