"""Ray Data over sets of conversations: slices out, the pooled latents of replies back, in order."""

import dataclasses
import json
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import numpy as np
import ray.data
import torch
from ray.data import ActorPoolStrategy
from ray.exceptions import RayError

from sae_ray import errors, tiny
from sae_ray.adapters.pooling import PooledRow, Skipped, SpanReader
from sae_ray.adapters.settings import FinetuneSettings
from sae_ray.adapters.spanning import span
from sae_ray.artifacts import write_atomically
from sae_ray.distributed.runtime import WORKER_ENV, cluster, plan_workers
from sae_ray.errors import SaeRayError, WorkError
from sae_ray.lm import DTypeName
from sae_ray.pool import Slice, read
from sae_ray.threads import one_thread

_ROWS_PER_READ = 64


@dataclasses.dataclass(frozen=True)
class SpanWork:
    """What is the same for every slice."""

    lm: str
    sae: str
    dtype: DTypeName = "float32"

    def load(self, device: str = "cpu") -> SpanReader:
        """Load model, SAE and tokenizer."""
        return SpanReader.load(self.lm, self.sae, dtype=self.dtype, device=device)


def subspaces_of(
    settings: FinetuneSettings,
    data: str,
    lm: str,
    saes: tuple[str, ...],
    *,
    leave_out: Collection[str],
    folder: Path,
    staging: str,
) -> list[Path]:
    """Make the subspaces of a training's settings from what workers read of its pools.

    Args:
        settings: which pools, and how much of each.
        data: the pool that is learnt from, which spans where no other is given.
        lm: folder of the model.
        saes: one subspace each.
        leave_out: ids of rows that judge.
        folder: local, for the subspaces.
        staging: folder for what must be converted first.
    """
    sets = {
        "positive": settings.positive or data,
        "reference": settings.reference or str(tiny.pool_path()),
        "control": settings.control,
        "retain": settings.retain,
    }
    return span(
        saes,
        {role: pool for role, pool in sets.items() if pool is not None},
        folder,
        lambda sae, slices: pooled_rows(slices, SpanWork(lm, sae), settings.num_workers),
        leave_out=leave_out,
        num_rows=settings.span_rows,
        staging=staging,
        seed=settings.seed,
    )


def keep_subspace(folder: Path, place: str) -> str:
    """Copy a subspace into a folder where every node finds it, and return where it lies."""
    for file in sorted(folder.iterdir()):
        write_atomically(f"{place}/{folder.name}/{file.name}", file.read_bytes())
    return f"{place}/{folder.name}"


class SpanPooler:
    """A worker: a reader loaded once, to which slices come.

    What is wrong for good comes back as a row, as `ShardWriter` in `data.py` says why.
    """

    def __init__(self, work: SpanWork, num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        self.work = work
        self.reader: SpanReader | None = None

    def __call__(self, batch: dict[str, list]) -> dict[str, np.ndarray]:
        """Pool the conversations of a batch of one slice."""
        piece = Slice(**json.loads(batch["slice"][0]))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self.reader = self.reader or self.work.load(device)
            answer = {"index": piece.index, "rows": pool_slice(self.reader, piece)}
        except SaeRayError as error:
            answer = {"error": type(error).__name__, "message": str(error)}
        part = np.empty(1, dtype=object)
        part[0] = answer
        return {"part": part}


def pool_slice(reader: SpanReader, piece: Slice) -> list[PooledRow | Skipped]:
    """Pool the conversations of one slice; rows that cannot be read are skipped with a reason."""
    found = read(piece)
    rows: list[PooledRow | Skipped] = [
        Skipped(one.id or f"row {one.row}", one.reason) for one in found.rejected
    ]
    with one_thread():
        for start in range(0, len(found.conversations), _ROWS_PER_READ):
            rows += reader(found.conversations[start : start + _ROWS_PER_READ])
    return rows


def pooled_rows(
    slices: Sequence[Slice], work: SpanWork, num_workers: int | None = None
) -> Iterator[PooledRow | Skipped]:
    """Yield what every conversation of some slices leaves, in their order, whoever is done first.

    Args:
        slices: of a plan (`sae_ray.pool.plan`).
        work: model and SAE.
        num_workers: 0 for this process alone; None for all the cluster has.

    Raises:
        ModelError: model and SAE cannot be used.
        WorkError: the cluster failed.
    """
    if num_workers == 0:
        reader = work.load()
        for piece in slices:
            yield from pool_slice(reader, piece)
        return
    waiting: dict[int, list[PooledRow | Skipped]] = {}
    with cluster():
        try:
            for part in _parts(slices, work, num_workers):
                waiting[part["index"]] = part["rows"]
                while slices and slices[0].index in waiting:
                    yield from waiting.pop(slices[0].index)
                    slices = slices[1:]
        except RayError as error:
            raise WorkError(
                f"the cluster failed with {len(slices)} slices to go: "
                f"{str(error).strip().splitlines()[-1]}; see that its machines answer and reach "
                "the conversations, then run the same line again"
            ) from error


def _parts(slices: Sequence[Slice], work: SpanWork, num_workers: int | None) -> Iterator[dict]:
    workers = plan_workers(num_workers)
    count = min(workers.count, len(slices))
    rows = [{"slice": json.dumps(dataclasses.asdict(piece))} for piece in slices]
    parts = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        SpanPooler,
        batch_size=1,
        compute=ActorPoolStrategy(min_size=1, max_size=count, initial_size=count),
        num_cpus=workers.num_cpus,
        num_gpus=workers.num_gpus or None,
        runtime_env={"env_vars": WORKER_ENV},
        fn_constructor_kwargs={"work": work, "num_threads": workers.num_cpus},
    )
    for row in parts.iter_rows():
        if "error" in row["part"]:
            raise getattr(errors, row["part"]["error"])(row["part"]["message"])
        yield row["part"]
