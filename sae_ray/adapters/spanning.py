"""Spanning: for each SAE the subspace along which conversations to learn differ from others."""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from sae_ray.adapters.contrast import contrast
from sae_ray.adapters.pooling import PooledRow, SpanReader
from sae_ray.adapters.subspace import Subspace
from sae_ray.chat import Conversation
from sae_ray.pool import plan, read

_ROWS = 64
_SLICE = 256


def span(
    lm: str,
    saes: Sequence[str],
    positive: str,
    reference: str,
    folder: Path,
    *,
    num_rows: int,
    staging: str,
    seed: int = 0,
) -> list[Path]:
    """Write the subspace of each SAE, and return their folders.

    Args:
        lm: the language model that the SAEs read.
        saes: folders or release:sae_id.
        positive: pool of what is to be learnt.
        reference: pool of ordinary conversations.
        folder: local; each subspace gets a folder in it.
        num_rows: read of either pool, from all over it.
        staging: folder for what must be converted first.
        seed: of the rows drawn, and of the random divisions that set the threshold.

    Raises:
        TaskError: no latent tells the pools apart.
    """
    sets = [_draw(pool, num_rows, staging, seed) for pool in (positive, reference)]
    share = len(sets[0]) / (len(sets[0]) + len(sets[1]))
    folders = []
    for number, sae in enumerate(saes):
        reader = SpanReader.load(lm, sae)
        rows = [_pooled(reader, conversations) for conversations in sets]
        found = contrast(reader.encoder.d_sae, *rows, share=share, seed=seed)
        folders.append(folder / f"{number}")
        Subspace.of(sae, found).save(folders[-1])
    return folders


def _draw(source: str, num_rows: int, staging: str, seed: int) -> list[Conversation]:
    """Return conversations from slices all over a pool."""
    slices = plan(source, rows_per_shard=_SLICE, staging=staging).slices
    order = np.random.default_rng(seed).permutation(len(slices))
    conversations = (one for i in order for one in read(slices[i]).conversations)
    return list(islice(conversations, num_rows))


def _pooled(reader: SpanReader, conversations: Sequence[Conversation]) -> Iterator[PooledRow]:
    for start in range(0, len(conversations), _ROWS):
        found = reader(conversations[start : start + _ROWS])
        yield from (row for row in found if isinstance(row, PooledRow))
