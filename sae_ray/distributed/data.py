"""Ray Data over slices of a pool: workers score shards into an index, whoever dies.

Only slices travel to the workers and only counts come back: each worker reads its slice, scores it
and writes its shard, so no activation passes through the object store. A shard is written whole or
not at all, so that a slice whose worker died is simply scored again, and a run that was killed goes
on with the shards that are missing.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import ray
import ray.data
import torch
from pydantic import JsonValue
from ray.data import ActorPoolStrategy
from ray.exceptions import RayError

from sae_ray import errors
from sae_ray.artifacts import State, begin, hash_file, is_finished, open_artifact
from sae_ray.curate.build import finish_index, read_part, write_shard
from sae_ray.curate.index import FEATURES_ONLY, KIND
from sae_ray.curate.scorer import LatentScorer, ScorerConfig, check_pair
from sae_ray.curate.settings import IndexSettings
from sae_ray.distributed.runtime import WORKER_ENV, Workers, cluster, plan_workers
from sae_ray.errors import ArtifactError, ConfigError, PoolError, SaeRayError
from sae_ray.pool import Plan, Slice, plan

logger = logging.getLogger(__name__)

_ATTEMPTS = 3
"""Times that a run is taken up again after the cluster, not the work, failed."""


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far an index is."""

    shards: int
    num_shards: int
    rows: int
    tokens: int
    rejected: int


class ShardWriter:
    """A worker: a scorer loaded once, to which slices come.

    What the user can put right comes back as a row: Ray keeps the text of an exception but not its
    type, and would start a worker that cannot load its model again and again.
    """

    def __init__(
        self, config: ScorerConfig, path: str, keep_columns: Sequence[str], num_threads: int
    ) -> None:
        torch.set_num_threads(num_threads)
        self.config, self.path, self.keep_columns = config, path, keep_columns
        self.scorer: LatentScorer | None = None

    def __call__(self, batch: dict[str, list]) -> dict[str, list[str]]:
        """Write the shards of a batch of slices; return what was counted, or what is wrong."""
        try:
            self.scorer = self.scorer or LatentScorer.load(self.config)
            parts = [
                write_shard(self.scorer, Slice(**json.loads(one)), self.path, self.keep_columns)
                for one in batch["slice"]
            ]
        except SaeRayError as error:
            return {"part": [json.dumps({"error": type(error).__name__, "message": str(error)})]}
        return {"part": [json.dumps(_counts(part)) for part in parts]}


def build_index(settings: IndexSettings, path: str) -> Iterator[Progress]:
    """Index a pool at `path`, yielding after every shard; a finished index costs nothing.

    Raises:
        PoolError, ModelError: the pool, or model and SAE, cannot be used.
        ArtifactError: the folder holds something else, or the disk is full.
    """
    config = settings.scorer_config()
    encoder = check_pair(config)
    pieces = plan(
        settings.pool_source,
        rows_per_shard=settings.rows_per_shard,
        staging=f"{path}/.staging",
    )
    keep = [name for name in settings.keep_columns if name in pieces.columns]
    if reserved := sorted({*FEATURES_ONLY, "messages"} & set(keep)):
        raise ConfigError(
            f"keep_columns={reserved[0]!r} is a column of the index itself: name others, or rename "
            "that column of the pool"
        )
    recorded: dict[str, JsonValue] = {
        **{k: v for k, v in dataclasses.asdict(config).items() if k != "check_fit"},
        "pool": settings.pool_source,
        "rows_per_shard": settings.rows_per_shard,
        "keep_columns": list(keep),
    }
    parents = {
        "pool": pieces.fingerprint,
        "lm": fingerprint(config.lm),
        "sae": fingerprint(config.sae),
    }
    if begin(path, KIND, recorded, parents) is State.FINISHED:
        return
    total = Progress(0, len(pieces.slices), 0, 0, 0)
    for part in _write_shards(pieces, config, path, keep, settings.num_workers):
        total = Progress(
            total.shards + 1,
            total.num_shards,
            total.rows + part["num_rows"],
            total.tokens + part["num_tokens"],
            total.rejected + part["num_rejected"],
        )
        yield total
    finish_index(path, len(pieces.slices), d_sae=encoder.d_sae, max_rejected=settings.max_rejected)


def ensure_index(settings: IndexSettings, path: str) -> Iterator[Progress]:
    """Build an index where there is none; one that is there must be of what was asked for."""
    if not is_finished(path, KIND):
        yield from build_index(settings, path)
        return
    manifest = open_artifact(path, KIND)
    said = settings.model_dump(mode="json", include=settings.model_fields_set)
    differences = [
        f"{name}: {manifest.config[name]!r} there, {value!r} here"
        for name, value in said.items()
        if name in manifest.config and value is not None and value != manifest.config[name]
    ]
    if settings.pool is not None:
        with contextlib.suppress(PoolError):  # a finished index needs its pool no more
            if plan(settings.pool).fingerprint != manifest.parents["pool"]:
                differences.append("the pool's contents have changed")
    if differences:
        raise ArtifactError(
            f"{path} holds an index made otherwise ({'; '.join(differences)}): give another "
            "--index, or leave these settings out"
        )


def fingerprint(source: str) -> str:
    """Return what identifies a model or SAE: a hash of a folder's weights, or a published name."""
    folder = Path(source)
    if not folder.is_dir():
        return source
    files = [f for f in sorted(folder.iterdir()) if f.suffix in (".safetensors", ".json", ".jinja")]
    hashes = [f"{file.name} {hash_file(str(file)).sha256}" for file in files]
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def _write_shards(
    pieces: Plan, config: ScorerConfig, path: str, keep: Sequence[str], num_workers: int | None
) -> Iterator[dict]:
    """Yield the counts of every shard once: those already there first."""
    missing: list[Slice] = []
    for piece in pieces.slices:
        part = read_part(path, piece.index)
        if part is None:
            missing.append(piece)
        else:
            yield _counts(part)
    if not missing:
        return
    if num_workers == 0:
        scorer = LatentScorer.load(config)
        for piece in missing:
            yield _counts(write_shard(scorer, piece, path, keep))
        return
    with cluster():
        yield from _on_ray(missing, config, path, keep, plan_workers(num_workers))


def _on_ray(
    missing: list[Slice], config: ScorerConfig, path: str, keep: Sequence[str], workers: Workers
) -> Iterator[dict]:
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            for row in _dataset(missing, config, path, keep, workers).iter_rows():
                part = json.loads(row["part"])
                if "error" in part:
                    raise getattr(errors, part["error"])(part["message"])
                missing = [piece for piece in missing if piece.index != part["shard"]]
                yield part
            return
        except RayError as error:
            if attempt == _ATTEMPTS:
                raise
            logger.warning(
                "the cluster failed with %d shards to go (%s); going on, attempt %d of %d",
                len(missing),
                str(error).strip().splitlines()[0],
                attempt + 1,
                _ATTEMPTS,
            )


def _dataset(
    missing: list[Slice], config: ScorerConfig, path: str, keep: Sequence[str], workers: Workers
) -> ray.data.Dataset:
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
        runtime_env={"env_vars": WORKER_ENV},
        fn_constructor_kwargs={
            "config": config,
            "path": path,
            "keep_columns": list(keep),
            "num_threads": workers.num_cpus,
        },
    )


def _counts(part: dict) -> dict:
    return {
        "shard": part["shard"],
        "num_rows": part["num_rows"],
        "num_tokens": part["num_tokens"],
        "num_rejected": len(part["rejected"]),
    }
