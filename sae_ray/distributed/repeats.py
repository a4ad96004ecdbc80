"""Ray Data over a pool's n-grams: which conversations repeat others, where the pool is large.

Slices become n-grams, n-grams are brought together by ranges of their hashes, and of each range
only those come back that more than one row holds: they alone decide what is dropped.
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import ray.data

from sae_ray.distributed.runtime import cluster
from sae_ray.sae.repeats import Grams, Order
from sae_ray.sae.shards import Row, read_texts
from sae_ray.tables import Slice

Columns = Any
"""Columns of numpy by name: Ray's type of a batch is wider than what is asked of it."""

_PAIRS_PER_RANGE = 4_000_000
_PAIRS_PER_ROW = 200
"""A guess, for the number of ranges."""


def find_repeats(
    slices: Sequence[Slice], order: Order, *, plain_text: bool, on_ray: bool
) -> frozenset[int]:
    """Return the numbers of the rows to drop, by `sae_ray.sae.repeats`; bad rows drop nothing."""
    if not on_ray:
        parts = [grams_of(part, plain_text=plain_text) for part in slices]
        return frozenset(Grams.joined(parts).repeats(order))
    with cluster():
        return frozenset(_shared(slices, plain_text=plain_text).repeats(order))


def grams_of(part: Slice, *, plain_text: bool) -> Grams:
    """Return the n-grams of a slice."""
    rows = read_texts(part, plain_text=plain_text)
    return Grams.of((row.number, row.turns) for row in rows if isinstance(row, Row))


def _shared(slices: Sequence[Slice], *, plain_text: bool) -> Grams:
    num_rows = sum(part.num_rows for part in slices)
    num_ranges = max(1, num_rows * _PAIRS_PER_ROW // _PAIRS_PER_RANGE)
    rows = [{"slice": json.dumps(dataclasses.asdict(part))} for part in slices]
    pairs = (
        ray.data.from_items(rows, override_num_blocks=len(rows))
        .map_batches(
            _ranged,  # pyright: ignore[reportArgumentType]
            batch_size=1,
            fn_kwargs={"plain_text": plain_text, "num_ranges": num_ranges},
        )
        .groupby("range", num_partitions=num_ranges)
        .map_groups(_keep_shared, batch_format="numpy")
    )
    batches = pairs.iter_batches(batch_size=None, batch_format="numpy")
    return Grams.joined([Grams.of([]), *(_grams(one) for one in batches if len(one))])


def _ranged(batch: Columns, plain_text: bool, num_ranges: int) -> Columns:
    """Read slices into n-grams, each with the range that its hash falls into."""
    parts = [Slice(**json.loads(one)) for one in batch["slice"]]
    found = Grams.joined([grams_of(part, plain_text=plain_text) for part in parts])
    return {"range": (found.grams % np.uint64(num_ranges)).astype(np.int64), **_columns(found)}


def _keep_shared(group: Columns) -> Columns:
    return _columns(_grams(group).shared())


def _columns(found: Grams) -> Columns:
    # Ray groups and sorts signed numbers; the bits stay the same.
    return {
        "gram": found.grams.view(np.int64),
        "row": found.rows,
        "rank": found.ranks.view(np.int64),
    }


def _grams(columns: Columns) -> Grams:
    grams, rows, ranks = (columns[name].astype(np.int64) for name in ("gram", "row", "rank"))
    return Grams(grams.view(np.uint64), rows, ranks.view(np.uint64))
