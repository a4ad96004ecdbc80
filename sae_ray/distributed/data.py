"""Ray Data over slices of a pool: workers score shards into an index, whoever dies.

Only slices travel to the workers and only counts come back: each worker reads its slice, scores it
and writes its shard, so no activation passes through the object store. A shard is written whole or
not at all, so that a slice whose worker died is simply scored again, and a run that was killed goes
on with the shards that are missing.
"""

import dataclasses
import json
import logging
import socket
from collections.abc import Iterator
from pathlib import Path

import ray
import ray.data
import torch
from ray.data import ActorPoolStrategy
from ray.data.exceptions import ExecutionTimeoutError
from ray.exceptions import RayError

from sae_ray import errors
from sae_ray.artifacts import RUN, begin, inspect, is_finished
from sae_ray.curate.build import FIT_SLICES, finish_index, read_part, refuse_bad_pool, write_shard
from sae_ray.curate.index import FEATURES_ONLY, KIND
from sae_ray.curate.scorer import LatentScorer, ScorerConfig, check_pair, memory_needed
from sae_ray.curate.settings import IndexSettings
from sae_ray.curate.sources import ROLES, describe_source, fingerprint
from sae_ray.distributed.progress import IndexProgress
from sae_ray.distributed.runtime import (
    WORKER_ENV,
    Workers,
    cluster,
    plan_workers,
    require_shared,
)
from sae_ray.errors import ConfigError, ModelError, SaeRayError, WorkError
from sae_ray.pool import Plan, Slice, plan
from sae_ray.threads import one_thread

logger = logging.getLogger(__name__)

_ATTEMPTS = 3
"""Times that a run is taken up again after the cluster, not the work, failed."""
_FAULTS = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError),
    *(RuntimeError, TypeError, ValueError),
)
"""What a worker raises again however often it is asked."""


@dataclasses.dataclass(frozen=True)
class Work:
    """What is the same for every shard."""

    config: ScorerConfig
    sae: str
    """Fingerprint of the SAE: a worker that finds another one under its name refuses."""
    path: str
    keep_columns: tuple[str, ...]
    fit_slices: tuple[Slice, ...]

    def write(self, scorer: LatentScorer, piece: Slice) -> dict:
        """Write one shard."""
        return write_shard(scorer, piece, self.path, self.keep_columns, self.fit_slices)


class ShardWriter:
    """A worker: a scorer loaded once, to which slices come.

    What is wrong for good comes back as a row: Ray keeps the text of an exception but not its
    type, and would start a worker that cannot load its model again and again. What may pass, a
    store that does not answer, is left to Ray.
    """

    def __init__(self, work: Work, num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        self.work = work
        self.scorer: LatentScorer | None = None

    def __call__(self, batch: dict[str, list]) -> dict[str, list[str]]:
        """Write the shards of a batch of slices; return what was counted, or what is wrong."""
        (piece,) = (Slice(**json.loads(one)) for one in batch["slice"])
        try:
            self.scorer = self.scorer or self._load()
            answer = _counts(self.work.write(self.scorer, piece))
        except SaeRayError as error:
            answer = {"error": type(error).__name__, "message": str(error)}
        except _FAULTS as error:
            logger.exception("shard %d", piece.index)
            last = piece.first_row + piece.num_rows - 1
            answer = {
                "error": WorkError.__name__,
                "message": f"shard {piece.index} (rows {piece.first_row} to {last} of the pool) "
                f"failed with {type(error).__name__}: {error}; see whether these rows, the model "
                "and its tokenizer, and the SAE are what they should be (the traceback is in the "
                "log that Ray keeps of this worker)",
            }
        return {"part": [json.dumps(answer)]}

    def _load(self) -> LatentScorer:
        if fingerprint("sae", self.work.config.sae) != self.work.sae:
            raise ModelError(
                f"the SAE {self.work.config.sae} is another one on {socket.gethostname()} than "
                "where the run began: give one that all machines share, or copy it to each"
            )
        return LatentScorer.load(self.work.config)


def build_index(settings: IndexSettings, path: str) -> Iterator[IndexProgress]:
    """Index a pool at `path`, yielding after every shard; a finished index costs nothing.

    Raises:
        PoolError, ModelError: the pool, or model and SAE, cannot be used.
        ArtifactError: the folder holds something else, or the disk is full.
        WorkError: the cluster failed, or a worker at rows that it names.
    """
    if is_finished(path, KIND):
        settings.require_same(path, {*settings.identity(), *ROLES})
        return
    config = settings.scorer_config()
    encoder = check_pair(config)
    recorded = settings.identity()
    parents = {role: fingerprint(role, settings.source(role)) for role in ("lm", "sae")}
    sources = {role: describe_source(role, settings.source(role)) for role in ROLES}
    # Before anything of the pool is converted into the folder.
    inspect(path, KIND, recorded, parents, sources, so_far=True)
    pieces = plan(
        settings.pool_source,
        rows_per_shard=settings.rows_per_shard,
        staging=f"{path}/.staging",
    )
    keep = tuple(name for name in settings.keep_columns if name in pieces.columns)
    named = settings.keep_columns if "keep_columns" in settings.model_fields_set else ()
    if unknown := sorted(set(named) - set(pieces.columns)):
        raise ConfigError(
            f"keep_columns={unknown[0]!r} is no column of {settings.pool_source}, whose first file "
            f"has {', '.join(sorted(pieces.columns))}: correct it, or leave it out"
        )
    if reserved := sorted({*FEATURES_ONLY, "messages"} & set(keep)):
        raise ConfigError(
            f"keep_columns={reserved[0]!r} is a column of the index itself: name others, or rename "
            "that column of the pool"
        )
    begin(path, KIND, recorded, {**parents, "pool": pieces.fingerprint}, sources)
    work = Work(config, parents["sae"], path, keep, pieces.slices[1:FIT_SLICES])
    total = IndexProgress(0, len(pieces.slices), 0, 0, 0)
    for part in _write_shards(pieces, work, settings.num_workers, memory_needed(config, encoder)):
        total = IndexProgress(
            total.shards + 1,
            total.num_shards,
            total.rows + part["num_rows"],
            total.tokens + part["num_tokens"],
            total.rejected + part["num_rejected"],
        )
        if total.rejected > settings.max_rejected * pieces.num_rows:
            refuse_bad_pool(path, total.num_shards, pieces.num_rows, settings.max_rejected)
        yield total
    finish_index(
        path,
        len(pieces.slices),
        d_sae=encoder.d_sae,
        max_rejected=settings.max_rejected,
        columns=keep,
    )


def _write_shards(
    pieces: Plan, work: Work, num_workers: int | None, memory_bytes: int
) -> Iterator[dict]:
    """Yield the counts of every shard once: those already there first."""
    missing: list[Slice] = []
    for piece in pieces.slices:
        part = read_part(work.path, piece.index)
        if part is None:
            missing.append(piece)
        else:
            yield _counts(part)
    if not missing:
        return
    if num_workers == 0:
        scorer = LatentScorer.load(work.config)
        for piece in missing:
            with one_thread():
                part = work.write(scorer, piece)
            yield _counts(part)
        return
    with cluster():
        workers = plan_workers(num_workers, memory_bytes)
        require_shared([missing[0].path, f"{work.path}/{RUN}", *_folders(work.config)])
        yield from _on_ray(missing, work, workers)


def _folders(config: ScorerConfig) -> list[str]:
    """Return where model and SAE lie, but for what is published by a name."""
    return [path for path in (config.lm, config.sae) if Path(path).is_dir()]


def _on_ray(missing: list[Slice], work: Work, workers: Workers) -> Iterator[dict]:
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            for row in _dataset(missing, work, workers).iter_rows():
                part = json.loads(row["part"])
                if "error" in part:
                    raise getattr(errors, part["error"])(part["message"])
                missing = [piece for piece in missing if piece.index != part["shard"]]
                yield part
            return
        except (RayError, ExecutionTimeoutError) as error:
            failed = f"{len(missing)} shards to go ({_said(error)})"
            if attempt == _ATTEMPTS:
                raise WorkError(
                    f"the cluster failed {_ATTEMPTS} times, at last with {failed}: see that its "
                    "machines answer and reach the pool and the index, then run the same line "
                    "again; it goes on where it stopped"
                ) from error
            logger.warning("the cluster failed with %s; going on", failed)


def _said(error: Exception) -> str:
    """Return the line of an error that says most: the last of a worker's traceback."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return (lines[-1 if "Traceback" in str(error) else 0]) if lines else type(error).__name__


def _dataset(missing: list[Slice], work: Work, workers: Workers) -> ray.data.Dataset:
    rows = [{"slice": json.dumps(dataclasses.asdict(piece))} for piece in missing]
    count = min(workers.count, len(missing))
    return ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        ShardWriter,
        batch_size=1,
        compute=ActorPoolStrategy(
            min_size=1, max_size=count, initial_size=count, max_tasks_in_flight_per_actor=2
        ),
        num_cpus=workers.num_cpus,
        num_gpus=workers.num_gpus or None,
        memory=workers.memory_bytes or None,
        runtime_env={"env_vars": WORKER_ENV},
        fn_constructor_kwargs={"work": work, "num_threads": workers.num_cpus},
    )


def _counts(part: dict) -> dict:
    return {
        "shard": part["shard"],
        "num_rows": part["num_rows"],
        "num_tokens": part["num_tokens"],
        "num_rejected": len(part["rejected"]),
    }
