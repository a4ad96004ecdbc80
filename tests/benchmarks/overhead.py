"""What Ray costs: an index on Ray against bare processes that write the same shards.

    python tests/benchmarks/overhead.py --pool POOL --lm LM --sae SAE --out overhead.json

Both sides have the same number of processes with the same settings, and take turns. What is
compared is from the first shard finished to the last, by the times that the file system keeps, so
that neither start-up nor the index's survey counts; those are shown apart.
"""

import argparse
import dataclasses
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from measure import (
    Child,
    Crew,
    Figure,
    Part,
    add_inputs,
    answer,
    child_settings,
    log,
    sample_pool,
    spread,
)

from sae_ray.curate import build
from sae_ray.curate.scorer import LatentScorer
from sae_ray.curate.settings import IndexSettings
from sae_ray.pool import plan


@dataclasses.dataclass(frozen=True)
class Run:
    """When the shards of one index were finished."""

    rows_per_s: float
    """From the first shard finished to the last, without the first's rows."""
    first_shard_s: float
    """From the request to the first shard."""
    rest_s: float
    """From the last shard to the end: the survey, where there is one."""

    @classmethod
    def read(
        cls, path: str, asked: float, ended: float, rows_per_shard: int, num_rows: int
    ) -> "Run":
        """Look at the times of a folder's shards."""
        times = sorted(file.stat().st_mtime for file in Path(path, "shards").iterdir())
        rate = (num_rows - rows_per_shard) / (times[-1] - times[0])
        return cls(rate, times[0] - asked, ended - times[-1])


def prepare_bare(settings: dict) -> Callable[[dict], dict]:
    """Make ready one process that writes its share of the shards."""
    index = IndexSettings(**settings["index"])
    scorer = LatentScorer.load(index.scorer_config())
    pieces = plan(index.pool_source, rows_per_shard=index.rows_per_shard).slices

    def repeat(request: dict) -> dict:
        for piece in pieces[request["share"] :: request["num_shares"]]:
            build.write_shard(scorer, piece, request["path"], request["keep_columns"])
        return {}

    return repeat


def prepare_ray(settings: dict) -> Callable[[dict], dict]:
    """Make ready a driver; Ray starts with the first request and stops behind each."""
    from sae_ray.distributed.data import build_index  # noqa: PLC0415 (loads Ray: one side only)

    index = IndexSettings(**settings["index"])

    def repeat(request: dict) -> dict:
        for _ in build_index(index, request["path"]):
            pass
        return {}

    return repeat


def main() -> None:
    """Take turns, and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_inputs(parser)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--rows_per_shard", type=int, default=1024)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", default="overhead.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sae-ray-") as folder:
        measure(options, folder)


def measure(options: argparse.Namespace, folder: str) -> None:
    """Index a sample on both sides in turn."""
    from sae_ray.distributed.runtime import WORKER_ENV  # noqa: PLC0415 (loads Ray)

    part, sample = Part("overhead"), f"{folder}/sample.parquet"
    num_rows = sample_pool(options.pool, options.rows, sample)
    index = {
        "pool": sample,
        "lm": options.lm,
        "sae": options.sae,
        "rows_per_shard": options.rows_per_shard,
        "num_workers": options.workers,
        "keep_columns": ["source"],
    }
    threads = {"OMP_NUM_THREADS": "1"}
    crews = {
        "ray": Crew([Child(__file__, {"side": "ray", "index": index}, {})]),
        "bare": Crew(
            [
                Child(__file__, {"side": "bare", "index": index}, WORKER_ENV | threads)
                for _ in range(options.workers)
            ]
        ),
    }
    keep = [name for name in ("source",) if name in plan(sample).columns]
    runs: dict[str, list[Run]] = {side: [] for side in crews}
    for i in range(options.repeats):
        for side, crew in crews.items():
            crew.wait_until_ready()
            path, asked = f"{folder}/{side}-{i}", time.time()
            crew.run({"path": path, "keep_columns": keep})
            runs[side].append(Run.read(path, asked, time.time(), options.rows_per_shard, num_rows))
            shutil.rmtree(path)
            log(f"round {i + 1} of {options.repeats}: {side} {runs[side][-1]}")
    for crew in crews.values():
        crew.close()
    rates = {side: spread([run.rows_per_s for run in found]) for side, found in runs.items()}
    overhead = 100 * (rates["bare"]["median"] / rates["ray"]["median"] - 1)
    # Until its first shard is finished the bare side does nothing but score it.
    startup = statistics.median(r.first_shard_s for r in runs["ray"]) - statistics.median(
        r.first_shard_s for r in runs["bare"]
    )
    part.figures += [
        Figure("Ray's overhead, first to last shard", overhead, "%", at_most=15),
        Figure("Ray's start-up and model loading", startup, "s"),
        Figure(
            "survey behind the last shard", statistics.median(r.rest_s for r in runs["ray"]), "s"
        ),
    ]
    part.details |= {
        "rows": num_rows,
        "rows_per_shard": options.rows_per_shard,
        "workers": options.workers,
        "rows_per_s": rates,
        "runs": {side: [dataclasses.asdict(run) for run in found] for side, found in runs.items()},
    }
    part.write(options.out)


if __name__ == "__main__":
    if settings := child_settings():
        torch.set_num_threads(1)
        answer({"bare": prepare_bare, "ray": prepare_ray}[settings["side"]](settings))
    else:
        main()
