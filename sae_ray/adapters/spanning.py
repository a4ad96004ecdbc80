"""Spanning: for each SAE the subspace along which conversations to learn differ from others."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from sae_ray.adapters.contrast import contrast
from sae_ray.adapters.pooling import PooledRow, Skipped
from sae_ray.adapters.subspace import Subspace
from sae_ray.pool import Slice, plan
from sae_ray.sae.pretrained import load_encoder

Pooling = Callable[[str, Sequence[Slice]], Iterator[PooledRow | Skipped]]
"""A SAE and slices of a pool to what each conversation leaves of its latents, on any machines."""

_ROWS_PER_SLICE = 64


def span(
    saes: Sequence[str],
    sets: Mapping[str, str],
    folder: Path,
    pooling: Pooling,
    *,
    leave_out: Collection[str] = (),
    num_rows: int,
    staging: str,
    seed: int = 0,
) -> list[Path]:
    """Write the subspace of each SAE, and return their folders.

    Args:
        saes: folders or release:sae_id.
        sets: the pool of each role that `contrast` knows: `positive`, what is to be learnt, and
            `reference`, ordinary conversations; `control` and `retain` if there are any.
        folder: local; each subspace gets a folder in it.
        pooling: reads conversations.
        leave_out: ids of rows that must stay unseen: those that an expert is judged by.
        num_rows: read of each pool, from all over it.
        staging: folder for what must be converted first.
        seed: of the slices drawn, and of the random divisions that set the threshold.

    Raises:
        TaskError: no latent tells the pools apart.
    """
    drawn = {role: _draw(pool, num_rows, staging, seed) for role, pool in sets.items()}
    against = "control" if "control" in drawn else "reference"
    sizes = [
        min(num_rows, sum(one.num_rows for one in drawn[role])) for role in ("positive", against)
    ]
    folders = []
    for number, sae in enumerate(saes):
        rows = {
            role: _pooled(pooling(sae, slices), leave_out, num_rows)
            for role, slices in drawn.items()
        }
        share = sizes[0] / sum(sizes)
        found = contrast(load_encoder(sae).d_sae, **rows, share=share, seed=seed)
        folders.append(folder / f"{number}")
        Subspace.of(sae, found).save(folders[-1])
    return folders


def _draw(source: str, num_rows: int, staging: str, seed: int) -> list[Slice]:
    """Return slices from all over a pool that hold at least so many rows, if it does."""
    slices = plan(source, rows_per_shard=_ROWS_PER_SLICE, staging=staging).slices
    chosen: list[Slice] = []
    for i in np.random.default_rng(seed).permutation(len(slices)):
        if sum(one.num_rows for one in chosen) >= num_rows:
            break
        chosen.append(slices[i])
    return chosen


def _pooled(
    rows: Iterator[PooledRow | Skipped], leave_out: Collection[str], num_rows: int
) -> Iterator[PooledRow]:
    kept = (row for row in rows if isinstance(row, PooledRow) and row.id not in leave_out)
    return islice(kept, num_rows)
