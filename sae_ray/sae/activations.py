"""FAST activations: each instance read alone, then tokens of many instances mixed.

The model reads chat instances right-padded in batches of like length, so each has exactly the
activations that it has alone (no instance sees another), special tokens included. Tokens then
pass through a mixing buffer, so that a batch for the SAE holds tokens of many instances.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int32
from torch import Tensor

from sae_ray.lm import HookPoint, LanguageModel

Instance = Int32[np.ndarray, " _"]


def length_buckets(
    instances: Sequence[Instance], tokens_per_batch: int, rng: np.random.Generator
) -> Iterator[list[int]]:
    """Yield batches of row numbers of like length, in random order, each row once.

    Rows times the longest of a batch stays within `tokens_per_batch`, save for a single row.
    """
    lengths = np.array([len(instance) for instance in instances])
    order = rng.permutation(len(instances))
    order = order[np.argsort(lengths[order], kind="stable")]
    groups: list[list[int]] = []
    # Longest first: the first row of a batch then sets its width.
    for row in order[::-1].tolist():
        if groups and lengths[groups[-1][0]] * (len(groups[-1]) + 1) <= tokens_per_batch:
            groups[-1].append(row)
        else:
            groups.append([row])
    for number in rng.permutation(len(groups)).tolist():
        yield groups[number]


def read_instances(
    model: LanguageModel, instances: Sequence[Instance], hook_point: HookPoint
) -> Float[Tensor, "tokens d_in"]:
    """Return the activations of a batch of instances, one behind the other, without padding."""
    width = max(map(len, instances))
    ids = torch.zeros(len(instances), width, dtype=torch.long)
    real = torch.zeros(len(instances), width, dtype=torch.bool)
    for row, instance in enumerate(instances):
        ids[row, : len(instance)] = torch.from_numpy(instance)
        real[row, : len(instance)] = True
    activations = model.read(ids.to(model.device))[hook_point]
    return activations[real.to(model.device)].float()


class MixingBuffer:
    """A full room of tokens: what comes in takes the places of randomly chosen ones that go out."""

    def __init__(self, num_tokens: int, d_in: int, seed: int) -> None:
        self._room = torch.empty(num_tokens, d_in)
        self._filled = 0
        self._generator = torch.Generator().manual_seed(seed)

    def exchange(self, tokens: Float[Tensor, "tokens d_in"]) -> Float[Tensor, "out d_in"]:
        """Put tokens in; return as many as there was no more room for, drawn from all places."""
        free = min(len(self._room) - self._filled, len(tokens))
        self._room[self._filled : self._filled + free] = tokens[:free]
        self._filled += free
        out = [self._swap(part) for part in tokens[free:].split(len(self._room))]
        return torch.cat(out) if out else tokens[:0]

    def _swap(self, tokens: Float[Tensor, "tokens d_in"]) -> Float[Tensor, "tokens d_in"]:
        places = torch.randperm(len(self._room), generator=self._generator)[: len(tokens)]
        out = self._room[places]
        self._room[places] = tokens
        return out


def activation_batches(
    model: LanguageModel,
    instances: Sequence[Instance],
    hook_point: HookPoint,
    *,
    rows_per_batch: int,
    buffer_tokens: int,
    tokens_per_forward: int = 8192,
    seed: int = 0,
) -> Iterator[Float[Tensor, "{rows_per_batch} d_in"]]:
    """Yield mixed activations for ever, each pass over the instances in another order."""
    rng = np.random.default_rng(seed)
    buffer: MixingBuffer | None = None
    waiting: list[Tensor] = []
    num_waiting = 0
    while True:
        for group in length_buckets(instances, tokens_per_forward, rng):
            tokens = read_instances(model, [instances[row] for row in group], hook_point)
            buffer = buffer or MixingBuffer(buffer_tokens, tokens.shape[1], seed)
            mixed = buffer.exchange(tokens)
            waiting.append(mixed)
            num_waiting += len(mixed)
            if num_waiting >= rows_per_batch:
                *batches, rest = torch.cat(waiting).split(rows_per_batch)
                if len(rest) == rows_per_batch:
                    batches, rest = [*batches, rest], rest[:0]
                yield from batches
                waiting, num_waiting = [rest], len(rest)
