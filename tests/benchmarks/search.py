"""What a search finds and costs beside a full grid of the same space, on the embedded model.

    python tests/benchmarks/search.py --out search.json

Both go through jobs/search.py: the search proposes and ends trials early; the grid trains every
combination to its end. Their bests, each over the same seeds, are compared on held-out rows that
chose neither. Cost is the sum of what trainings took, on the same number of cores.
"""

import argparse
import contextlib
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
from joblib import cpu_count
from measure import ROOT, Figure, Part, log

from sae_ray import tiny
from sae_ray.adapters.trial import TrialRecord
from sae_ray.evaluate.study import finished, over_seeds

SPACE = (
    "{adapter: [lora, steering, affine, residual], learning_rate: [0.001, 0.003, 0.01, 0.03, 0.1],"
    " layers: [[0], [1], [2], [3], [0, 1, 2, 3]], targets: [[q_proj, k_proj, v_proj, o_proj],"
    " [gate_proj, up_proj, down_proj]]}"
)
SIZE = 65
"""Combinations of it that count: 50 of lora, 5 each of steering, affine and residual."""


class Busy:
    """Watches what share of the cores a process and its children keep busy, a second at a time."""

    def __init__(self, pid: int) -> None:
        self.samples: list[tuple[float, float]] = []
        self._process, self._last = psutil.Process(pid), dict[int, float]()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Busy":
        self._thread.start()
        return self

    def __exit__(self, *_raised: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(1):
            with contextlib.suppress(psutil.NoSuchProcess):
                tree = [self._process, *self._process.children(recursive=True)]
                self.samples.append((time.time(), sum(map(self._grown, tree))))

    def _grown(self, process: psutil.Process) -> float:
        """Return the seconds of a core that a process has used since it was last looked at."""
        try:
            used = sum(process.cpu_times()[:2])
        except psutil.NoSuchProcess:
            return 0.0
        grown = used - self._last.get(process.pid, used)
        self._last[process.pid] = used
        return grown

    def between(self, start: float, end: float) -> float:
        """Return the share of this machine's cores that were busy."""
        found = [grown for at, grown in self.samples if start <= at <= end]
        return sum(found) / (end - start) / cpu_count()


def search(options: argparse.Namespace, pool: Path, out: Path, *more: str) -> tuple[float, Busy]:
    """Run a study and return its seconds, and how busy it was."""
    command = [sys.executable, str(ROOT / "jobs/search.py"), f"--data={pool}", f"--space={SPACE}"]
    command += [f"--max_rows={options.rows}", f"--num_epochs={options.epochs}", f"--out={out}"]
    command += ["--held_out_rows=80", "--general_rows=8", f"--seed={options.seed}", *more]
    start = time.monotonic()
    with subprocess.Popen(command, stdout=sys.stderr) as process, Busy(process.pid) as busy:
        assert process.wait() == 0, f"{command} ended with {process.returncode}"
    return time.monotonic() - start, busy


def records_of(study: Path) -> list[TrialRecord]:
    paths = sorted((study / "trials").glob("*.json"))
    return [TrialRecord.model_validate_json(path.read_text()) for path in paths]


def best_of(study: Path) -> list[TrialRecord]:
    """Return the runs of the best settings that were searched, one a seed of the finals."""
    groups: dict[str, list[TrialRecord]] = {}
    for one in finished(records_of(study)):
        if one.role == "finalist":
            groups.setdefault(str(sorted(one.point.items())), []).append(one)
    return min(groups.values(), key=lambda runs: sum(one.loss or 0.0 for one in runs) / len(runs))


def steps_of(records: list[TrialRecord]) -> int:
    """Count the steps of what was searched: all have as many rows."""
    return sum(one.glances[-1].step for one in records if one.role == "searched" and one.glances)


def seconds_of(records: list[TrialRecord], *roles: str) -> float:
    return sum(one.seconds for one in records if one.role in roles)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--pool", default=str(tiny.pool_path()), help="Parquet with `domain`")
    parser.add_argument("--domain", default="order")
    parser.add_argument("--rows", type=int, default=240)
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--grid", type=int, default=SIZE, help="trials of the grid, at most all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="search.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        pool = Path(folder) / "pool.parquet"
        table = pq.read_table(options.pool)
        pq.write_table(
            table.filter([one == options.domain for one in table["domain"].to_pylist()]), pool
        )
        studies = Path(folder) / "search", Path(folder) / "grid"
        took, busy = search(options, pool, studies[0], f"--num_trials={options.trials}")
        log(f"searched in {took:.0f} s")
        places = sorted((studies[0] / "trials").glob("*.json"))
        times = sorted(path.stat().st_mtime for path in places[: options.trials])
        share = busy.between(times[0], times[-1])
        more = (f"--num_trials={options.grid}", "--sampler=grid", "--no-prune")
        grid_took, _ = search(options, pool, studies[1], *more)
        mine, grid = map(records_of, studies)
        bests = [best_of(study) for study in studies]
        for name, runs in zip(("search", "grid"), bests, strict=True):
            log(f"best of the {name}: {runs[0].point}, {len(runs)} seeds")
        judged = [[one.best for one in runs if one.best is not None] for runs in bests]
        gain = over_seeds(judged[1], judged[0], "sft")
    cost, full = (seconds_of(one, "searched") for one in (mine, grid))
    whole = seconds_of(mine, "searched", "reference", "finalist")
    part = Part("search")
    part.figures += [
        Figure("search, from the line to its page", took / 60, "min", at_most=15),
        Figure("cores busy from the first trial's end to the last's", 100 * share, "%", 85),
        Figure("trials ended early", sum(one.status == "pruned" for one in mine), ""),
        Figure("search / grid, steps", steps_of(mine) / steps_of(grid), "x", at_most=0.4),
        Figure("search / grid, seconds of training", cost / full, "x"),
        Figure("search with its finalists / grid without", whole / full, "x"),
        Figure("grid, from the line to its page", grid_took / 60, "min"),
        Figure("loss of the search's best", gain.expert, "nats"),
        Figure("loss of the grid's best", gain.base, "nats"),
        Figure("gain of the search's best over the grid's", gain.gain, "nats"),
        Figure("... its upper end", gain.high, "nats", 0, note=f"lower end {gain.low:.4f}"),
    ]
    part.details |= {
        "bests": [[one.model_dump(mode="json") for one in runs[:1]] for runs in bests],
        "options": vars(options),
    }
    part.write(options.out)


if __name__ == "__main__":
    main()
