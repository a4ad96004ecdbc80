"""Peak memory of every process while a pool is indexed and re-targeted, at three sizes.

    python tests/benchmarks/memory.py --pool POOL --lm LM --sae SAE --work DIR --out memory.json

The indexes stay in the work folder, as index-10000, ..., index-whole; those that are there and
finished are only re-targeted. Peaks are the system's own (VmHWM), read while the processes live.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from measure import ROOT, Figure, Part, Peak, add_inputs, descriptions, log, run_watched, show

ROLES = ("driver", "worker", "raylet", "gcs_server", "other")


def role_of(peak: Peak) -> str:
    """Say what a process is, by its command."""
    if "jobs/" in peak.name:
        return "driver"
    for daemon in ("raylet", "gcs_server"):
        if f"/{daemon}" in peak.name.split(" ")[0]:
            return daemon
    return "worker" if "ShardWriter" in peak.name or "MapWorker" in peak.name else "other"


def largest(peaks: list[Peak]) -> dict[str, float]:
    """Return the largest peak of each role, in MB."""
    by_role = {role: [p.peak_mb for p in peaks if role_of(p) == role] for role in ROLES}
    return {role: max(found) for role, found in by_role.items() if found}


def write_part_of_pool(source: str, num_rows: int, path: Path) -> int:
    """Write rows spread evenly over a pool, so that lengths are as in the whole."""
    table = pq.read_table(source)
    rows = np.linspace(0, table.num_rows - 1, min(num_rows, table.num_rows)).astype(np.int64)
    pq.write_table(table.take(pa.array(rows)), path)
    return len(rows)


def index(options: argparse.Namespace, size: int) -> tuple[Path, dict[str, float]]:
    """Index a part of the pool on Ray, unless that is done; return where it is, and peaks."""
    whole = pq.read_metadata(options.pool).num_rows
    path, pool = options.work / "index-whole", options.pool
    if size < whole:
        path = options.work / f"index-{size}"
        pool = path.with_suffix(".parquet")
    if (path / "manifest.json").exists():
        return path, {}
    options.work.mkdir(parents=True, exist_ok=True)
    if size < whole:
        write_part_of_pool(options.pool, size, pool)
    command = [sys.executable, str(ROOT / "jobs" / "index.py"), "--pool", str(pool)]
    command += ["--lm", options.lm, "--sae", options.sae, "--out", str(path)]
    seconds, peaks = run_watched(command)
    log(f"indexed {size} rows in {seconds:.0f} s")
    return path, largest(peaks)


def retarget(task: str, path: Path) -> dict[str, float]:
    """Curate over a finished index; return peaks."""
    with tempfile.TemporaryDirectory(prefix="sae-ray-") as folder:
        command = [sys.executable, str(ROOT / "jobs" / "curate.py"), "--task", task]
        command += ["--index", str(path), "--out", f"{folder}/selection"]
        _, peaks = run_watched(command)
    return largest(peaks)


def main() -> None:
    """Measure all sizes, and hold the largest against the smallest."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_inputs(parser)
    parser.add_argument(
        "--sizes", type=lambda t: [int(x) for x in t.split(",")], default=[10_000, 30_000, 91_092]
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", default="memory.json")
    options = parser.parse_args()
    part, task = Part("memory"), descriptions()[0]
    found: dict[str, dict[int, dict[str, float]]] = {"indexing": {}, "re-targeting": {}}
    for size in options.sizes:
        path, peaks = index(options, size)
        if peaks:
            found["indexing"][size] = peaks
        found["re-targeting"][size] = retarget(task, path)
    for what, by_size in found.items():
        peaks = {size: max(roles.values()) for size, roles in by_size.items()}
        for size, peak in peaks.items():
            part.figures.append(Figure(f"{what}, {size:,} rows: largest process", peak, "MB"))
        if len(peaks) > 1:
            part.figures += [
                Figure(f"{what}, {role}: most / least", max(seen) / min(seen), "x", at_most=1.2)
                for role in ROLES
                if len(seen := [one[role] for one in by_size.values() if role in one]) > 1
            ]
    part.details |= {"peak_mb": found}
    show(
        "peak of the largest process of each kind, MB",
        ("", "rows", *ROLES),
        (
            (what, f"{size:,}", *(f"{roles.get(role, 0):.0f}" for role in ROLES))
            for what, by_size in found.items()
            for size, roles in by_size.items()
        ),
    )
    part.write(options.out)


if __name__ == "__main__":
    main()
