"""FAST activations: each sequence read alone, then tokens of many of them mixed.

The model reads sequences right-padded in batches of like length, so each has exactly the
activations that it has alone (no instance sees another), special tokens included. Tokens then
pass through a mixing buffer, so that a batch for the SAE holds tokens of many instances.

Instances come in shards: fixed ranges of a pool, read when their turn comes. Batches are made
inside a shard, in an order that the seed decides, so where a stream stands is three numbers.
"""

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sae_ray.errors import PoolError
from sae_ray.lm import HookPoint, LanguageModel
from sae_ray.sae.buffer import MixingBuffer, TokenBatch
from sae_ray.sae.sequences import TOKEN, Arrangement, Lanes, length_buckets

logger = logging.getLogger(__name__)

Shard = Callable[[], Sequence[Lanes]]
"""Reads the instances of one fixed range of a pool, the same ones every time."""


def read_sequences(
    model: LanguageModel, sequences: Sequence[Lanes]
) -> dict[HookPoint, Float[Tensor, "tokens _"]]:
    """Return the activations of a batch of sequences, one behind the other, without padding."""
    lengths = [len(one) for one in sequences]
    width = max(lengths)
    ids = torch.zeros(len(sequences), width, dtype=torch.long)
    for row, one in enumerate(sequences):
        ids[row, : lengths[row]] = torch.from_numpy(one[:, TOKEN])
    read = model.read(ids.to(model.device))
    flat = {point: x.flatten(0, 1) for point, x in read.items()}
    if sum(lengths) == ids.numel():
        return flat
    real = torch.arange(width) < torch.tensor(lengths).unsqueeze(1)
    index = real.flatten().nonzero().squeeze(1).to(model.device)
    return {point: x.index_select(0, index) for point, x in flat.items()}


@dataclasses.dataclass
class Cursor:
    """Where a stream stands: what it has yielded of which shard in which pass."""

    num_passes: int = 0
    shard: int = 0
    """Place in this pass's order of shards."""
    batch: int = 0
    """Batches of that shard that have been yielded."""


@dataclasses.dataclass
class Counts:
    """What a stream has read, summed over passes."""

    instances: int = 0
    tokens: int = 0
    padding: int = 0
    """Slots that the model computed for nothing."""
    cut_instances: int = 0
    cut_tokens: int = 0
    """Left out behind the cap."""

    @property
    def padding_share(self) -> float:
        """Padding over all slots of the model's batches."""
        return self.padding / max(1, self.tokens + self.padding)


class ActivationStream:
    """Reads shards through a model for ever, each pass in another order; can be stopped anywhere.

    Two streams with the same arguments yield the same, and one that was given another's state
    goes on where that one stood.
    """

    def __init__(
        self,
        model: LanguageModel,
        shards: Sequence[Shard],
        arrangement: Arrangement | None = None,
        *,
        tokens_per_forward: int = 8192,
        seed: int = 0,
    ) -> None:
        self.model, self.shards = model, shards
        self.arrangement = arrangement or Arrangement()
        self.tokens_per_forward, self.seed = tokens_per_forward, seed
        self.cursor, self.counts = Cursor(), Counts()
        self._batches: Iterator[TokenBatch] | None = None

    def __iter__(self) -> "ActivationStream":
        return self

    def __next__(self) -> TokenBatch:
        self._batches = self._batches or self._read()
        return next(self._batches)

    def state_dict(self) -> dict[str, Any]:
        """Return where the stream stands and what it has counted."""
        return {
            "cursor": dataclasses.asdict(self.cursor),
            "counts": dataclasses.asdict(self.counts),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where a stream over the same shards stood."""
        self.cursor, self.counts = Cursor(**state["cursor"]), Counts(**state["counts"])
        self._batches = None

    def _read(self) -> Iterator[TokenBatch]:
        cursor = self.cursor
        while True:
            tokens_before = self.counts.tokens
            order = self._rng(cursor.num_passes).permutation(len(self.shards)).tolist()
            started_within = cursor.shard > 0 or cursor.batch > 0
            while cursor.shard < len(order):
                yield from self._read_shard(order[cursor.shard])
                cursor.shard, cursor.batch = cursor.shard + 1, 0
            cursor.num_passes, cursor.shard = cursor.num_passes + 1, 0
            if self.counts.tokens == tokens_before and not started_within:
                raise PoolError(
                    f"none of the {len(self.shards)} shards to train on holds a token: give more "
                    "rows, fewer workers, or look at the rejected rows for the reason"
                )

    def _read_shard(self, shard: int) -> Iterator[TokenBatch]:
        cursor, counts = self.cursor, self.counts
        rng = self._rng(cursor.num_passes, shard)
        instances = self.shards[shard]()
        sequences = self.arrangement.arrange(
            [instances[i] for i in rng.permutation(len(instances))]
        )
        lengths = [len(one) for one in sequences]
        if cursor.batch == 0 and cursor.num_passes == 0:  # the same are cut in every pass
            lost = [num for one in instances if (num := self.arrangement.num_cut(one))]
            counts.instances += len(instances)
            counts.cut_instances += len(lost)
            counts.cut_tokens += sum(lost)
        groups = list(length_buckets(lengths, self.tokens_per_forward, rng))
        for group in groups[cursor.batch :]:
            batch = self._forward([sequences[row] for row in group])
            # Before the yield: a state taken while the caller has the batch counts it as read.
            cursor.batch += 1
            counts.tokens += len(batch)
            counts.padding += len(group) * max(lengths[row] for row in group) - len(batch)
            yield batch

    def _forward(self, sequences: list[Lanes]) -> TokenBatch:
        lanes = torch.from_numpy(np.concatenate(sequences)).to(self.model.device)
        return TokenBatch(lanes, read_sequences(self.model, sequences))

    def _rng(self, *key: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, *key))


class Feed:
    """Mixed batches for training, for ever: a stream through a buffer, whose state can be kept."""

    def __init__(
        self,
        stream: Iterator[TokenBatch],
        *,
        batch_tokens: int = 4096,
        buffer_batches: int = 16,
        seed: int = 0,
    ) -> None:
        self.stream = stream
        self.buffer = MixingBuffer(batch_tokens, buffer_batches, seed)

    def __iter__(self) -> "Feed":
        return self

    def __next__(self) -> TokenBatch:
        self._fill()
        return self.buffer.take()

    def sample(self) -> TokenBatch:
        """Return a room full of tokens without taking any out: to estimate scales and means."""
        self._fill()
        return self.buffer.contents()

    def state_dict(self) -> dict[str, Any]:
        """Return where stream and buffer stand."""
        assert isinstance(self.stream, ActivationStream)
        return {"stream": self.stream.state_dict(), "buffer": self.buffer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where a feed of the same making stood."""
        assert isinstance(self.stream, ActivationStream)
        self.stream.load_state_dict(state["stream"])
        self.buffer.load_state_dict(state["buffer"])

    def _fill(self) -> None:
        while not self.buffer.is_full:
            self.buffer.put(next(self.stream))
