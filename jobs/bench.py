#!/usr/bin/env python
"""Measures what the service promises: each part in a process of its own, one table, one file."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

from sae_ray.config import JobConfig, OutputPath, run_job

BENCHMARKS = Path(__file__).parents[1] / "tests/benchmarks"
QUICK = {
    "speed": "--rows 200 --tune_rows 32 --repeats 2",
    "overhead": "--rows 2000 --rows_per_shard 200 --repeats 1",
    "memory": "--sizes 500,1000,2000",
    "retarget": "--size 2000 --repeats 2",
    "agreement": "--rows 100 --index_rows 2000",
    "quality": "--rows 6000 --splits report",
    "train_speed": "--rows 100 --steps 1 --rounds 1 --quality_steps 10 --batch_tokens 512",
    "fast_claim": "--steps 5 --batch_tokens 512 --seeds 2 --d_sae 128 --held_out 30",
    "finetune_speed": "--steps 6 --rounds 1 --latent_rounds 2",
    "finetune_effect": "--seeds 1 --domains order --rows 32 --held_out 16 --epochs 1",
    "routing": "--rows 120 --divisions 1",
    "serving": "--requests 4 --experts 2 --answer_tokens 8 --rounds 1",
    "serving_load": "--seconds 5 --probe_seconds 5",
    "planted_latents": "--runs 2 --controls 1",
    "attribution_cost": "--rows 40 --rounds 1",
    "search": "--rows 60 --epochs 1 --trials 2 --grid 2",
}
ENDS = dict(curate=(0, 6), train_sae=(6, 8), finetune=(8, 10), serve=(10, 13), explain=(13, 16))
SUITES = {suite: [*QUICK][slice(*ends)] for suite, ends in ENDS.items()}
TAKES = dict(fast_claim="pool lm", serving="lm", serving_load="lm")


class Config(JobConfig):
    """Measure curate, train_sae, finetune, serve or explain, on a machine with no other work.

    python jobs/bench.py curate --out runs/bench --parts speed,agreement
    """

    parts: list[Literal[tuple(QUICK)]] = list(SUITES["curate"])  # pyright: ignore
    """What to measure."""
    pool: str | None = None
    """Parquet file. Default: the real pool that lies beside the project, else the embedded one."""
    lm: str | None = None
    """Model that reads, or is trained; as for the pool."""
    sae: str | None = None
    """SAE of that model; as for the pool."""
    quick: bool = False
    """Small sizes, to see that everything runs: the figures mean nothing."""
    out: OutputPath
    """Folder for results.json, each part's file, and the indexes that are made on the way."""


def main(config: Config) -> int:
    """Run the parts one after the other and print their figures as one table."""
    out, failed, table = Path(config.out), 0, Table("part", "figure", "value", "target", "")
    for part in config.parts:
        command = [sys.executable, f"{BENCHMARKS}/{part}.py", f"--out={out}/{part}.json"]
        takes = TAKES.get(part, "pool lm sae" * (part not in SUITES["explain"])).split()
        command += [f"--{one}={given}" for one in takes if (given := getattr(config, one))]
        command += [f"--work={out}/work"] * (part in ("memory", "retarget", "quality"))
        command += QUICK[part].split() * config.quick
        failed += subprocess.run(command, check=False).returncode != 0
    results = {p: json.loads(f.read_text()) for p in QUICK if (f := out / f"{p}.json").exists()}
    for part, row in ((part, row) for part, one in results.items() for row in one["rows"]):
        table.add_row(part, *row)
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    Console().print(table)
    return min(failed, 1)


if __name__ == "__main__":
    suite, *words = sys.argv[1:] or [""]
    words = [f"--parts={','.join(SUITES.get(suite, ()))}", *words]  # a later --parts counts
    sys.exit(run_job(main, Config, words if suite in SUITES else None))
