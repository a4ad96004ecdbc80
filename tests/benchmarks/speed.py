"""Indexing speed: conversations a second of LatentScorer against the plain way, in one run.

    python tests/benchmarks/speed.py --pool POOL --lm LM --sae SAE --out speed.json

Every contestant has processes of its own, kept warm and asked in turn (A B C A B C ...), so that
a change in the machine's load meets all of them. The plain way's batch size, threads, precision and
allocator settings are searched first, and its best are taken. Ours is timed as an index is made:
reading the pool, tokenising, forward, encoding, pooling, writing shards; the plain way is given its
conversations in memory and leaves its result there.
"""

import argparse
import dataclasses
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from itertools import product

import torch
from contestants import PREPARE, count_work
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
    show,
    spread,
)

from sae_ray.curate.scorer import ScorerConfig
from sae_ray.lm import fast_dtype

# What sae_ray.distributed.runtime gives to Ray's workers.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "33554432", "MALLOC_TRIM_THRESHOLD_": "4294967296"}
DTYPES = ("float32", "bfloat16") if fast_dtype() == "bfloat16" else ("float32",)
"""A machine that only emulates bf16 is slower in it by far: its figures are of fp32 alone."""
PLAIN_BATCHES = (8, 16, 32, 64, 128)


@dataclasses.dataclass(frozen=True)
class Entry:
    """A contestant."""

    way: str
    """plain, ours, or peak: nothing but matrix products."""
    dtype: str
    processes: int
    threads: int
    """Of each process."""
    batch: int = 0
    """Conversations for the plain way, tokens for ours."""
    length_sorted: bool = True
    malloc: bool = True

    @property
    def name(self) -> str:
        """Say what it is in a line."""
        order = "" if self.length_sorted else ", file order"
        batch = f", batch {self.batch}" if self.batch else ""
        malloc = ", malloc" if self.malloc else ""
        crew = f"{self.processes} x {self.threads} threads"
        return f"{self.way} {self.dtype}{order}, {crew}{batch}{malloc}"

    @property
    def crew(self) -> tuple[str, str, int, bool]:
        """Entries with the same share their processes."""
        return self.way, self.dtype, self.processes, self.malloc


@dataclasses.dataclass
class Contest:
    """Where things are, and the processes that are kept warm."""

    config: ScorerConfig
    sample: str
    num_rows: int
    folder: str
    crews: dict[tuple, Crew] = dataclasses.field(default_factory=dict)

    def start(self, entries: Iterable[Entry]) -> None:
        """Start the processes of these contestants and end those of all others."""
        wanted = {entry.crew for entry in entries}
        for key in self.crews.keys() - wanted:
            self.crews.pop(key).close()
        for way, dtype, processes, malloc in sorted(wanted - self.crews.keys()):
            settings = {
                "way": way,
                "config": dataclasses.asdict(dataclasses.replace(self.config, dtype=dtype)),
                "sample": self.sample,
                "rows_per_shard": -(-self.num_rows // 2),
                "folder": self.folder,
            }
            children = [
                Child(__file__, settings, MALLOC if malloc else {}) for _ in range(processes)
            ]
            self.crews[way, dtype, processes, malloc] = Crew(children)
        for crew in self.crews.values():
            crew.wait_until_ready()

    def run(self, entry: Entry, rows: int) -> tuple[float, list[dict]]:
        """Let one contestant work once: its seconds, and what its processes say."""
        request = {
            "rows": rows,
            "threads": entry.threads,
            "batch": entry.batch,
            "length_sorted": entry.length_sorted,
        }
        return self.crews[entry.crew].run(request)


def tune(contest: Contest, rows: int) -> tuple[list[Entry], dict[str, float]]:
    """Search the plain way's settings on a part of the sample, one after the other.

    First the batch, in each precision and order; then, at the best batch, processes and allocator.

    Returns the best of each precision, order and number of processes; and all rates.
    """
    rates: dict[Entry, float] = {}

    def best_of(entries: list[Entry]) -> Entry:
        contest.start(entries)
        for entry in entries:
            if entry not in rates:
                contest.run(entry, min(rows, 64))  # the first call is slow
                rates[entry] = rows / contest.run(entry, rows)[0]
        return max(entries, key=rates.__getitem__)

    best: list[Entry] = []
    for dtype, length_sorted in product(DTYPES, (True, False)):
        entry = best_of(
            [Entry("plain", dtype, 1, 2, batch, length_sorted) for batch in PLAIN_BATCHES]
        )
        best.append(best_of([entry, dataclasses.replace(entry, malloc=False)]))
        if length_sorted:
            two = [
                dataclasses.replace(best[-1], processes=2, threads=1, batch=b)
                for b in PLAIN_BATCHES
            ]
            best.append(best_of(two))
        log(f"tried the plain way in {dtype}, sorted by length: {length_sorted}")
    best.sort(key=lambda entry: -rates[entry])
    return best, {entry.name: rate for entry, rate in rates.items()}


def compete(
    contest: Contest, entries: list[Entry], repeats: int
) -> tuple[dict[Entry, list[float]], dict[Entry, list[list[dict]]]]:
    """Let all work in turn, several times; return rows a second and what the processes said."""
    contest.start(entries)
    rates: dict[Entry, list[float]] = {entry: [] for entry in entries}
    said: dict[Entry, list[list[dict]]] = {entry: [] for entry in entries}
    for entry in entries:
        contest.run(entry, min(contest.num_rows, 64))
    for i in range(repeats):
        for entry in entries:
            # In file order a part is as good as the whole, and it is slow.
            rows = contest.num_rows if entry.length_sorted else -(-contest.num_rows // 4)
            seconds, replies = contest.run(entry, rows)
            rates[entry].append(rows / seconds)
            said[entry].append(replies)
        log(
            f"round {i + 1} of {repeats}: "
            + ", ".join(f"{e.name} {r[-1]:.0f}" for e, r in rates.items())
        )
    return rates, said


def choose(best: list[Entry], batch_tokens: int) -> dict[str, Entry]:
    """Name the contestants; `best` holds the plain way's, fastest first."""
    single = [entry for entry in best if entry.processes == 1]
    named: dict[str, Entry] = {}
    for dtype in DTYPES:
        one = next(e for e in single if e.length_sorted and e.dtype == dtype)
        named[f"plain, {dtype}"] = one
        named[f"ours, {dtype}"] = Entry("ours", dtype, 2, 1, batch_tokens)
        named[f"ours, {dtype}, 1 x 2 threads"] = Entry("ours", dtype, 1, 2, batch_tokens)
        named[f"peak, {dtype}, 2 x 1"] = Entry("peak", dtype, 2, 1)
        named[f"peak, {dtype}, 1 x 2"] = Entry("peak", dtype, 1, 2)
    fastest = named[f"plain, {DTYPES[-1]}"]
    return named | {
        "plain, other malloc": dataclasses.replace(fastest, malloc=not fastest.malloc),
        "plain, 2 processes": next(e for e in best if e.length_sorted and e.processes == 2),
        "plain, file order": next(e for e in single if not e.length_sorted),
    }


def measure(options: argparse.Namespace, part: Part, contest: Contest) -> None:
    """Tune, compete, and draw the figures from it."""
    best, tuning = tune(contest, min(options.tune_rows, contest.num_rows))
    named = choose(best, options.batch_tokens)
    rates, said = compete(contest, list(named.values()), options.repeats)
    rows = {name: spread(rates[entry]) for name, entry in named.items() if entry.way != "peak"}
    middle = {name: one["median"] for name, one in rows.items()}
    work, tokens = count_work(contest.config, contest.sample)
    sorted_ways = [name for name in middle if name.startswith("plain") and "order" not in name]
    plain = max(middle[name] for name in sorted_ways)
    for dtype in reversed(DTYPES):
        name, fast = f"ours, {dtype}", dtype == DTYPES[-1]
        peak = max(
            sum(reply["flops"] for reply in replies)
            for entry in (named[f"peak, {dtype}, 2 x 1"], named[f"peak, {dtype}, 1 x 2"])
            for replies in said[entry]
        )
        share = middle[name] * work / contest.num_rows / peak
        if fast:
            order, two = middle["plain, file order"], middle["plain, 2 processes"]
            part.figures += [
                Figure(f"{name} / plain sorted, at its best", middle[name] / plain, "x", 4),
                Figure(f"{name} / plain in file order", middle[name] / order, "x", 12),
                Figure(f"{name} / plain sorted in 2 processes", middle[name] / two, "x"),
            ]
        if dtype == "float32":
            ratio = middle[name] / middle["plain, float32"]
            part.figures.append(Figure(f"{name} / plain sorted in float32", ratio, "x", 2.5))
        part.figures += [
            Figure(
                f"{name}: share of the matmul peak",
                100 * share,
                "%",
                35 if fast else None,
                note=f"of {peak / 1e9:.0f} GFLOP/s",
            ),
            Figure(name, middle[name], "conversations/s"),
            Figure(name, middle[name] * tokens / contest.num_rows, "tokens/s"),
        ]
    stages = share_by_stage(said[named[f"ours, {DTYPES[-1]}"]])
    part.details |= {
        "rows": contest.num_rows,
        "tokens": tokens,
        "flop_per_token": work / tokens,
        "contestants": {name: entry.name for name, entry in named.items()},
        "conversations_per_s": rows,
        "stages_percent": stages,
        "tuning_conversations_per_s": tuning,
    }
    show_rates(rows, named, tokens / contest.num_rows)
    show(
        "where the time of ours goes", ("stage", "%"), ((k, f"{v:.1f}") for k, v in stages.items())
    )


def share_by_stage(said: list[list[dict]]) -> dict[str, float]:
    """Return each stage's share of the time, in percent."""
    total: dict[str, float] = defaultdict(float)
    for reply in (one for replies in said for one in replies):
        for stage, seconds in reply.items():
            total[stage] += seconds
    return {stage: 100 * s / sum(total.values()) for stage, s in total.items()}


def explore(options: argparse.Namespace, part: Part, contest: Contest) -> None:
    """Compare ours with itself: tokens in a batch, processes and threads, allocator."""
    found = [
        Entry("ours", dtype, processes, threads, batch, malloc=malloc)
        for dtype in DTYPES
        for processes, threads in ((1, 2), (2, 1))
        for malloc in (False, True)
        for batch in options.explore
    ]
    entries = {entry.name: entry for entry in found}
    rates, _ = compete(contest, list(entries.values()), options.repeats)
    rows = {name: spread(rates[entry]) for name, entry in entries.items()}
    part.details |= {"conversations_per_s": rows}
    show_rates(rows, entries, count_work(contest.config, contest.sample)[1] / contest.num_rows)


def show_rates(rows: dict[str, dict], named: dict[str, Entry], tokens_per_row: float) -> None:
    """Print how fast each contestant was."""
    show(
        "conversations a second",
        ("contestant", "least", "median", "most", "tokens/s", "settings"),
        (
            (
                name,
                *(f"{one[k]:.1f}" for k in ("min", "median", "max")),
                f"{one['median'] * tokens_per_row:,.0f}",
                named[name].name,
            )
            for name, one in rows.items()
        ),
    )


def main() -> None:
    """Run the contest."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_inputs(parser)
    parser.add_argument("--rows", type=int, default=4096, help="two shards of the usual size")
    parser.add_argument("--tune_rows", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch_tokens", type=int, default=ScorerConfig.batch_tokens)
    parser.add_argument(
        "--explore", type=lambda text: [int(x) for x in text.split(",")], help="tokens in a batch"
    )
    parser.add_argument("--out", default="speed.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sae-ray-") as folder:
        sample = f"{folder}/sample.parquet"
        num_rows = sample_pool(options.pool, options.rows, sample)
        config = ScorerConfig(options.lm, options.sae)
        contest, part = Contest(config, sample, num_rows, folder), Part("speed")
        try:
            (explore if options.explore else measure)(options, part, contest)
        finally:
            contest.start(())
    part.write(options.out)


if __name__ == "__main__":
    if settings := child_settings():
        torch.set_grad_enabled(False)
        answer(PREPARE[settings["way"]](settings))
    else:
        main()
