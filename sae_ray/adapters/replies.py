"""How likely a model finds replies, row by row: on held-out rows, pairs and plain text."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from sae_ray.adapters.examples import Example, PairExample

IGNORED = -100
"""What labels hold where no loss looks."""
_TOKENS_AT_ONCE = 1024

Forward = Callable[..., object]
"""A causal language model, however it is wrapped: called with input_ids and attention_mask."""
Gather = Callable[[list], list]
"""Takes what each worker holds to all of them: lists of equal length, in the order of the ranks."""


@dataclasses.dataclass(frozen=True, slots=True)
class RowLoss:
    """Of one row: the sum over its learnt tokens, and how many they are."""

    nats: float
    num_tokens: int


def row_losses(
    model: Forward,
    rows: Sequence[Example],
    *,
    micro_rows: int,
    pad: int,
    device: torch.device | str = "cpu",
    rank: int = 0,
    num_workers: int = 1,
    gather: Gather | None = None,
    with_labels: bool = False,
) -> list[RowLoss]:
    """Return the loss of each row, in order; workers take turns at rows and all get the result.

    Labels are given to a model that acts on answers alone: what it says is then of these rows.

    Every worker calls the model equally often, as ZeRO-3 needs: one that runs out reads its last
    rows again, and what comes of it is not counted.
    """
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    batches = [order[i : i + micro_rows] for i in range(0, len(order), micro_rows)]
    mine: list[tuple[list[int], list[RowLoss]]] = []
    for start in range(0, len(batches), num_workers):
        batch = batches[min(start + rank, len(batches) - 1)]
        losses = _losses(model, [rows[i] for i in batch], pad, device, with_labels)
        mine.append((batch if start + rank < len(batches) else [], losses))
    found: dict[int, RowLoss] = {}
    for batch, losses in gather(mine) if gather else mine:
        found |= dict(zip(batch, losses, strict=False))
    return [found[i] for i in range(len(rows))]


def flat(pairs: Sequence[PairExample]) -> list[Example]:
    """Return the sequences of pairs: chosen and rejected in turn."""
    return [one for pair in pairs for one in (pair.chosen, pair.rejected)]


def padded(
    rows: Sequence[Example], pad: int
) -> tuple[Int[Tensor, "rows seq"], Bool[Tensor, "rows seq"], Bool[Tensor, "rows seq"]]:
    """Return ids right-padded to the longest, which of them are real, and which are learnt."""
    length = max(len(row.ids) for row in rows)
    ids = np.full((len(rows), length), pad, dtype=np.int64)
    real, learnt = np.zeros((2, len(rows), length), dtype=bool)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = row.ids
        real[i, : len(row.ids)] = True
        learnt[i, : len(row.ids)] = row.learnt
    return torch.from_numpy(ids), torch.from_numpy(real), torch.from_numpy(learnt)


def labels_of(
    ids: Int[Tensor, "rows seq"], learnt: Bool[Tensor, "rows seq"]
) -> Int[Tensor, "rows seq"]:
    """Return the ids that are learnt, and elsewhere what no loss looks at."""
    return ids.masked_fill(~learnt, IGNORED)


@torch.no_grad()
def _losses(
    model: Forward,
    rows: Sequence[Example],
    pad: int,
    device: torch.device | str,
    with_labels: bool,
) -> list[RowLoss]:
    ids, real, learnt = (one.to(device) for one in padded(rows, pad))
    more = {"labels": labels_of(ids, learnt)} if with_labels else {}
    output = model(input_ids=ids, attention_mask=real.long(), use_cache=False, **more)
    counted = learnt[:, 1:]
    nats = torch.zeros(counted.shape, device=counted.device)
    nats[counted] = _nats(output.logits[:, :-1][counted], ids[:, 1:][counted])  # pyright: ignore[reportAttributeAccessIssue]
    sums, counts = nats.double().sum(1).tolist(), counted.sum(1).tolist()
    return [RowLoss(a, b) for a, b in zip(sums, counts, strict=True)]


def _nats(
    logits: Float[Tensor, "tokens vocab"], targets: Int[Tensor, " tokens"]
) -> Float[Tensor, " tokens"]:
    """Return minus the log probability of each target; each token is as wide as the vocabulary."""
    pairs = zip(logits.split(_TOKENS_AT_ONCE), targets.split(_TOKENS_AT_ONCE), strict=True)
    return torch.cat([cross_entropy(x.float(), t, reduction="none") for x, t in pairs])
