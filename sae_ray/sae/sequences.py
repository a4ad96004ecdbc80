"""Sequences that a model reads alone: instances of a pool, in one of the four FAST regimes.

What is read is an array with one row a token: the conversation it comes from, its position where
the model sees it, its id and its kind. A regime only decides how instances become sequences:

    fast         each instance alone, cut at a cap
    bt_f         instances one behind the other, cut into blocks: each sees those before it
    bt_f_masked  the same blocks, each instance's piece of a block alone: blocks with a mask
    bt_p         the blocks of `bt_f`, of plain text

An attention mask that keeps instances apart, with positions that begin anew, gives each piece of
a block exactly what it has alone; so that regime needs no mask either.

Source: FAST, arXiv 2506.07691, 3.1 and 4.1; `bt_f_masked` is an ablation that the paper lacks.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Int32
from transformers import PreTrainedTokenizerBase

from sae_ray.chat import ChatTokenizer, Conversation, Kind, Unreadable
from sae_ray.errors import ConfigError

Lanes = Int32[np.ndarray, "_ 4"]
"""What is known of each token, in columns."""

CONVERSATION, POSITION, TOKEN, KIND = range(4)

Regime = Literal["fast", "bt_f", "bt_f_masked", "bt_p"]

UNCUT = 2**31 - 1

MAX_PADDING = 0.05
"""Share of a batch that may be padding."""


@dataclasses.dataclass(frozen=True, slots=True)
class Arrangement:
    """How instances become sequences."""

    regime: Regime = "fast"
    max_tokens: int = 8192
    """Cap of an instance in `fast`: what lies behind it is not read, but counted."""
    block_tokens: int = 2048
    """Length of a block in the other regimes."""

    def __post_init__(self) -> None:
        for name in ("max_tokens", "block_tokens"):
            if (value := getattr(self, name)) < 1:
                raise ConfigError(f"{name}={value}: give a number of tokens of at least 1")

    @property
    def context_size(self) -> int:
        """Return the most tokens that a sequence has."""
        return self.max_tokens if self.regime == "fast" else self.block_tokens

    def num_cut(self, instance: Lanes) -> int:
        """Return how many of an instance's tokens are not read."""
        return max(0, len(instance) - self.max_tokens) if self.regime == "fast" else 0

    def arrange(self, instances: Sequence[Lanes]) -> list[Lanes]:
        """Return the sequences that a model reads, each alone, with positions from 0."""
        if self.regime == "fast":
            return [one[: self.max_tokens] for one in instances if len(one)]
        pieces: list[Lanes] = []
        block: list[Lanes] = []
        room = self.block_tokens
        for instance in instances:
            at = 0
            while at < len(instance):
                block.append(instance[at : at + room])
                at, room = at + len(block[-1]), room - len(block[-1])
                if room == 0:
                    pieces += self._sequences(block)
                    block, room = [], self.block_tokens
        return [_at_positions(one) for one in pieces + self._sequences(block)]

    def _sequences(self, block: list[Lanes]) -> list[Lanes]:
        return block if self.regime == "bt_f_masked" or not block else [np.concatenate(block)]


def _at_positions(sequence: Lanes) -> Lanes:
    sequence = sequence.copy()
    sequence[:, POSITION] = np.arange(len(sequence))
    return sequence


def instance_of(
    ids: Sequence[int] | np.ndarray,
    kinds: Sequence[int] | np.ndarray | None = None,
    *,
    conversation: int = 0,
) -> Lanes:
    """Return tokens as an instance; without kinds, all of them count as content."""
    lanes = np.empty((len(ids), 4), dtype=np.int32)
    lanes[:, CONVERSATION] = conversation
    lanes[:, POSITION] = np.arange(len(ids))
    lanes[:, TOKEN] = ids
    lanes[:, KIND] = Kind.CONTENT if kinds is None else kinds
    return lanes


def chat_instances(
    tokenizer: ChatTokenizer, conversations: Sequence[Conversation], *, first: int = 0
) -> tuple[list[Lanes], list[tuple[str, Unreadable]]]:
    """Return conversations as instances, numbered from `first`, and (id, why) of the others."""
    instances: list[Lanes] = []
    unreadable: list[tuple[str, Unreadable]] = []
    rows = tokenizer.tokenize(conversations, UNCUT)
    for number, (conversation, row) in enumerate(zip(conversations, rows, strict=True), first):
        if isinstance(row, Unreadable):
            unreadable.append((conversation.id, row))
        else:
            instances.append(instance_of(row.ids, row.kinds, conversation=number))
    return instances, unreadable


def text_instances(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, first: int = 0
) -> list[Lanes]:
    """Return plain texts as instances; what the tokenizer puts around them is special."""
    added = np.array(sorted(tokenizer.added_tokens_decoder), dtype=np.int64)
    rows: list[list[int]] = tokenizer(list(texts))["input_ids"] if texts else []  # pyright: ignore
    return [
        instance_of(ids, np.where(np.isin(ids, added), Kind.SPECIAL, 0), conversation=number)
        for number, ids in enumerate(rows, first)
    ]


def length_buckets(
    lengths: Sequence[int] | np.ndarray, tokens_per_batch: int, rng: np.random.Generator
) -> Iterator[list[int]]:
    """Yield batches of row numbers of like length, in random order, each row once.

    Rows times the longest of a batch stays within `tokens_per_batch`, save for a single row, and
    at most `MAX_PADDING` of that is padding.
    """
    lengths = np.asarray(lengths)
    order = rng.permutation(len(lengths))
    order = order[np.argsort(lengths[order], kind="stable")]
    groups: list[list[int]] = []
    width = used = 0
    # Longest first: the first row of a batch then sets its width.
    for row in order[::-1].tolist():
        used += int(lengths[row])
        slots = width * (len(groups[-1]) + 1) if groups else 0
        if slots and slots <= tokens_per_batch and used >= (1 - MAX_PADDING) * slots:
            groups[-1].append(row)
        else:
            groups.append([row])
            width = used = int(lengths[row])
    for number in rng.permutation(len(groups)).tolist():
        yield groups[number]
