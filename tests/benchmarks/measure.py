"""What the benchmarks share: the machine, its load, processes to time, memory peaks, results."""

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from rich.console import Console
from rich.table import Table

from sae_ray import tiny
from sae_ray.chat import Conversation
from sae_ray.tiny.split import is_held_out

ROOT = Path(__file__).parents[2]
VERSIONED = ("sae-ray", "ray", "torch", "transformers", "sae-lens", "numpy", "pyarrow")


@dataclasses.dataclass(frozen=True)
class Figure:
    """One measured number, with what it should be."""

    name: str
    value: float
    unit: str
    at_least: float | None = None
    at_most: float | None = None
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Say whether the target is met, or None without one."""
        if self.at_least is not None:
            return bool(self.value >= self.at_least)
        return None if self.at_most is None else bool(self.value <= self.at_most)

    @property
    def row(self) -> tuple[str, str, str, str]:
        """Lay it out for a table."""
        target = "" if self.at_least is None else f"≥ {self.at_least:g}"
        target = target if self.at_most is None else f"≤ {self.at_most:g}"
        verdict = {None: "", True: "met", False: "MISSED"}[self.met]
        return self.name, f"{self.value:,.4g} {self.unit}", target, f"{verdict} {self.note}"


@dataclasses.dataclass
class Part:
    """A part of a benchmark: figures in order, tables for the curious, and how it was run."""

    name: str
    figures: list[Figure] = dataclasses.field(default_factory=list)
    details: dict[str, object] = dataclasses.field(default_factory=dict)
    started: str = dataclasses.field(default_factory=lambda: datetime.now(UTC).isoformat())
    load_before: tuple[float, ...] = dataclasses.field(default_factory=os.getloadavg)

    def write(self, out: str | Path) -> None:
        """Print the figures and write them with hardware, versions and command."""
        report = {
            "part": self.name,
            "started": self.started,
            "finished": datetime.now(UTC).isoformat(),
            "load_average_before": self.load_before,
            "command": " ".join(["python", *sys.orig_argv[1:]]),
            "hardware": hardware(),
            "versions": versions(),
            "figures": [{**dataclasses.asdict(f), "met": f.met} for f in self.figures],
            "rows": [f.row for f in self.figures],
            "details": self.details,
        }
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(json.dumps(report, indent=1) + "\n")
        show(self.name, ("figure", "value", "target", ""), (f.row for f in self.figures))


def show(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table."""
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    Console(width=140).print(table)


def add_inputs(parser: argparse.ArgumentParser) -> None:
    """Add what is measured: the real pool and its model where they lie beside the project."""
    real = ROOT.parent / "shared"
    lm = real / "models" / "pool-lm-2.6m"
    found = (real / "data" / "pool.parquet", lm, lm / "sae_blocks.2.hook_resid_post")
    if not all(path.exists() for path in found):
        found = (tiny.pool_path(), tiny.lm_path(), tiny.sae_path())
    for name, path in zip(("pool", "lm", "sae"), found, strict=True):
        parser.add_argument(f"--{name}", default=str(path))


def log(message: str) -> None:
    """Say on stderr what is going on, and how loaded the machine is."""
    print(f"[load {os.getloadavg()[0]:.1f}] {message}", file=sys.stderr, flush=True)


def hardware() -> dict[str, object]:
    """Describe this machine."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(x.split(":", 1)[1].strip() for x in lines if x.startswith("model name"))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(memory / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
    }


def versions() -> dict[str, str]:
    """Return the versions of what the figures depend on."""
    return {"python": platform.python_version()} | {
        name: metadata.version(name) for name in VERSIONED
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return least, middle and greatest."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def sample_pool(source: str | Path, num_rows: int, path: str | Path, *, seed: int = 0) -> int:
    """Write a random sample of a pool's unseen half, in the order of the pool; return its size."""
    table = pq.read_table(source)
    ids = table["id"].to_pylist()
    unseen = np.flatnonzero([is_held_out(one) for one in ids])
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.choice(unseen, min(num_rows, len(unseen)), replace=False))
    pq.write_table(table.take(pa.array(chosen)), path)
    return len(chosen)


def read_sample(path: str | Path) -> list[Conversation]:
    """Read a sample back."""
    rows = pq.read_table(path, columns=["id", "messages"]).to_pylist()
    return [Conversation(row["id"], row["messages"]) for row in rows]


def descriptions() -> list[str]:
    """Return sentences to ask for, one domain after the other."""
    text = Path(__file__).with_name("curation_descriptions.yaml").read_text()
    return [splits["report"][0] for splits in yaml.safe_load(text)["domains"].values()]


class Child:
    """A process of its own in which one thing is repeated and timed on request.

    Imports, thread pools and the allocator's state are its own. It sits idle between requests, so
    that several can be kept warm and asked in turn.
    """

    def __init__(
        self, script: str, settings: Mapping[str, object], environment: Mapping[str, str]
    ) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", script, "--child", json.dumps(settings)],
            env=os.environ | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        self._ready = False

    def send(self, request: Mapping[str, object]) -> None:
        """Ask for one repetition."""
        self.wait_until_ready()
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")

    def receive(self) -> dict:
        """Wait for what it has measured."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a benchmark process ended early, code {self.process.wait()}")
        return json.loads(line)

    def wait_until_ready(self) -> None:
        """Wait until it has loaded what it needs."""
        if not self._ready:
            assert self.receive() == {"ready": True}
            self._ready = True

    def close(self) -> None:
        """Let it end."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def child_settings() -> dict | None:
    """Return what a child is told by its command line, or None where this is no child."""
    return json.loads(sys.argv[2]) if sys.argv[1:2] == ["--child"] else None


def answer(repeat: Callable[[dict], dict]) -> None:
    """Be a child: repeat on request, until no more is asked for."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not mix with the replies
    replies.write(json.dumps({"ready": True}) + "\n")
    for line in sys.stdin:
        replies.write(json.dumps(repeat(json.loads(line))) + "\n")


@dataclasses.dataclass
class Crew:
    """Children that share one piece of work."""

    children: list[Child]

    def wait_until_ready(self) -> None:
        """Wait until all have loaded what they need."""
        for child in self.children:
            child.wait_until_ready()

    def run(self, request: Mapping[str, object]) -> tuple[float, list[dict]]:
        """Start all at once; return seconds until the last is done, and what each says."""
        self.wait_until_ready()
        started = time.perf_counter()
        for k, child in enumerate(self.children):
            child.send({**request, "share": k, "num_shares": len(self.children)})
        replies = [child.receive() for child in self.children]
        return time.perf_counter() - started, replies

    def close(self) -> None:
        """End all."""
        for child in self.children:
            child.close()


@dataclasses.dataclass
class Peak:
    """Peak of one process."""

    name: str
    peak_mb: float


class ProcessTree:
    """Watches a process and all that descend from it, and keeps each one's peak memory."""

    def __init__(self, root: int, every_s: float) -> None:
        self.every_s = every_s
        self.peaks: dict[int, Peak] = {}
        self._known = {root}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def close(self) -> dict[int, Peak]:
        """Stop watching and return the peaks."""
        self._stop.set()
        self._thread.join()
        return self.peaks

    def _watch(self) -> None:
        while not self._stop.wait(self.every_s):
            parents = dict(_parents())
            grown = True
            while grown:  # who has once descended from the root stays known when its parent ends
                found = {p for p, parent in parents.items() if parent in self._known}
                grown = not found <= self._known
                self._known |= found
            for pid in self._known & parents.keys():
                self._look_at(pid)

    def _look_at(self, pid: int) -> None:
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{pid}/status").read_text()
            command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            for line in status.splitlines():
                if line.startswith("VmHWM"):
                    peak_mb = int(line.split()[1]) / 1024
                    before = self.peaks.get(pid)
                    if before is None or peak_mb >= before.peak_mb:
                        self.peaks[pid] = Peak(command.strip()[:200], peak_mb)


def _parents() -> Iterator[tuple[int, int]]:
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                stat = Path(f"/proc/{entry.name}/stat").read_text()
                yield int(entry.name), int(stat.rpartition(")")[2].split()[1])


def run_watched(command: Sequence[str], *, every_s: float = 0.05) -> tuple[float, list[Peak]]:
    """Run a command to its end; return its seconds and the peak of every process it started."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=sys.stderr)
    tree = ProcessTree(process.pid, every_s)
    code = process.wait()
    seconds = time.perf_counter() - started
    peaks = tree.close()
    if code:
        raise RuntimeError(f"{' '.join(command)} ended with code {code}")
    return seconds, list(peaks.values())
