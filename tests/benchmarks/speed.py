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
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from itertools import product

import torch
from measure import (
    Child,
    Crew,
    Figure,
    Part,
    answer,
    child_settings,
    log,
    read_sample,
    sample_pool,
    show,
    spread,
)
from torch import nn

from sae_ray import tiny
from sae_ray.chat import ChatTokenizer, Kind, Tokens
from sae_ray.curate import build, scorer
from sae_ray.curate.block import IndexBlock
from sae_ray.curate.scorer import LatentScorer, ScorerConfig
from sae_ray.pool import plan

# What sae_ray.distributed.runtime gives to Ray's workers.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "33554432", "MALLOC_TRIM_THRESHOLD_": "4294967296"}
DTYPES = ("float32", "bfloat16")
PLAIN_BATCHES = (8, 16, 32, 64, 128)
STAGES: dict[str, tuple[tuple[object, str], ...]] = {
    "read the pool": ((build, "read"),),
    "tokenise": ((LatentScorer, "_tokenize"),),
    "forward": ((LatentScorer, "_read"),),
    "encode and pool": ((scorer.LatentEncoder, "pool"),),
    "make sparse": ((LatentScorer, "_sparse"), (scorer, "_segments"), (scorer, "_segment_means")),
    "write": ((IndexBlock, "to_table"), (build, "_parquet"), (build, "write_atomically")),
}


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


# What the processes of a contestant do


def prepare_plain(settings: dict) -> Callable[[dict], dict]:
    """Make ready the plain way over a sample."""
    from plain import PlainWay  # noqa: PLC0415 (loads sae-lens, which ours must not pay for)

    config = ScorerConfig(**settings["config"])
    conversations = read_sample(settings["sample"])
    way = PlainWay(config.lm, config.sae, config.dtype)
    max_tokens = min(config.max_tokens, way.model.config.max_position_embeddings)
    tokenised = ChatTokenizer.load(config.lm).tokenize(conversations, max_tokens)
    content = [t.kinds == Kind.CONTENT for t in tokenised if isinstance(t, Tokens)]
    assert len(content) == len(conversations)

    def repeat(request: dict) -> dict:
        torch.set_num_threads(request["threads"])
        mine = slice(request["share"], request["rows"], request["num_shares"])
        way(
            conversations[mine],
            content[mine],
            batch_rows=request["batch"],
            max_tokens=max_tokens,
            length_sorted=request["length_sorted"],
        )
        return {}

    return repeat


def prepare_ours(settings: dict) -> Callable[[dict], dict]:
    """Make ready the writing of a sample's shards."""
    config = ScorerConfig(**settings["config"])
    ours = LatentScorer.load(config)
    seconds: dict[str, float] = defaultdict(float)
    for stage, functions in STAGES.items():
        for owner, name in functions:
            add_up_seconds(owner, name, stage, seconds)
    # Shard 0 also checks that the SAE fits, once an index; its number is passed over.
    pieces = [
        dataclasses.replace(piece, index=piece.index + 1)
        for piece in plan(settings["sample"], rows_per_shard=settings["rows_per_shard"]).slices
    ]

    def repeat(request: dict) -> dict:
        torch.set_num_threads(request["threads"])
        seconds.clear()
        ours.config = dataclasses.replace(config, batch_tokens=request["batch"])
        out = tempfile.mkdtemp(dir=settings["folder"])
        started = time.perf_counter()
        for piece in pieces[request["share"] :: request["num_shares"]]:
            build.write_shard(ours, piece, out)
        wall = time.perf_counter() - started
        shutil.rmtree(out)
        return {**seconds, "everything else": wall - sum(seconds.values())}

    return repeat


def prepare_peak(settings: dict) -> Callable[[dict], dict]:
    """Make ready matrix products of several sizes, to find the fastest."""
    dtype = getattr(torch, settings["config"]["dtype"])
    shapes = [(512, 512, 512), (1024, 1024, 1024), (2048, 2048, 2048), (4096, 1024, 1024)]
    operands = [(torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)) for m, k, n in shapes]

    def repeat(request: dict) -> dict:
        torch.set_num_threads(request["threads"])
        best = 0.0
        for a, b in operands:
            (m, k), n = a.shape, b.shape[1]
            out = torch.empty(m, n, dtype=dtype)
            for _ in range(12):
                started = time.perf_counter()
                torch.mm(a, b, out=out)
                best = max(best, 2 * m * k * n / (time.perf_counter() - started))
        return {"flops": best}

    return repeat


PREPARE = {"plain": prepare_plain, "ours": prepare_ours, "peak": prepare_peak}


def add_up_seconds(owner: object, name: str, stage: str, seconds: dict[str, float]) -> None:
    """Let a function add the time that it takes to its stage."""
    function = getattr(owner, name)

    def timed(*args: object, **kwargs: object) -> object:
        started = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            seconds[stage] += time.perf_counter() - started

    setattr(owner, name, timed)


def count_work(config: ScorerConfig, sample: str) -> tuple[int, int]:
    """Count the operations that real tokens take, and the tokens.

    Of the truncated forward and the dense encoding; matrix products only: linear layers, attention
    up to the diagonal, the encoder.
    """
    ours = LatentScorer.load(config)
    lengths = [len(t) for t in ours._tokenize(read_sample(sample)) if isinstance(t, Tokens)]
    model = ours.lm.model
    weights = [p for m in model.modules() if not isinstance(m, nn.Embedding) for p in m._parameters.values()]
    linear = sum(p.numel() for p in weights if p is not None and p.ndim == 2)
    heads = model.config.num_attention_heads
    width = heads * (getattr(model.config, "head_dim", None) or model.config.hidden_size // heads)
    layers = model.config.num_hidden_layers
    attention = sum(2 * width * n * (n + 1) for n in lengths) * layers
    encoder = ours.encoder.d_in * ours.encoder.d_sae
    return 2 * (linear + encoder) * sum(lengths) + attention, sum(lengths)


# The contest


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
    """Try the plain way's settings on a part of the sample.

    Returns the best of each precision, order and number of processes; and all rates.
    """
    rates: dict[Entry, float] = {}
    for dtype, malloc in product(DTYPES, (False, True)):
        tried = [
            Entry("plain", dtype, processes, threads, batch, length_sorted, malloc)
            for processes, threads in ((1, 1), (1, 2), (2, 1))
            for batch in PLAIN_BATCHES
            for length_sorted in (True, False)
        ]
        contest.start(tried)
        for i, entry in enumerate(tried):
            if i % len(PLAIN_BATCHES) == 0:
                contest.run(entry, min(rows, 64))  # the first call is slow
            rates[entry] = rows / contest.run(entry, rows)[0]
        log(f"tried the plain way in {dtype}, malloc set: {malloc}")
    best: dict[tuple, Entry] = {}
    for entry, rate in rates.items():
        kind = entry.dtype, entry.length_sorted, entry.processes
        if kind not in best or rate > rates[best[kind]]:
            best[kind] = entry
    ordered = sorted(best.values(), key=lambda entry: -rates[entry])
    return ordered, {entry.name: rate for entry, rate in rates.items()}


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
            seconds, replies = contest.run(entry, contest.num_rows)
            rates[entry].append(contest.num_rows / seconds)
            said[entry].append(replies)
        log(f"round {i + 1} of {repeats}: " + ", ".join(f"{e.name} {r[-1]:.0f}" for e, r in rates.items()))
    return rates, said


def choose(best: list[Entry], batch_tokens: int) -> dict[str, Entry]:
    """Name the contestants; `best` holds the plain way's, fastest first."""
    single = [entry for entry in best if entry.processes == 1]
    return {
        "plain, fp32": next(e for e in single if e.length_sorted and e.dtype == "float32"),
        "plain, bf16": next(e for e in single if e.length_sorted and e.dtype == "bfloat16"),
        "plain, 2 processes": next(e for e in best if e.length_sorted and e.processes == 2),
        "plain, file order": next(e for e in single if not e.length_sorted),
        "ours, bf16": Entry("ours", "bfloat16", 2, 1, batch_tokens),
        "ours, fp32": Entry("ours", "float32", 2, 1, batch_tokens),
        "ours, bf16, 1 x 2 threads": Entry("ours", "bfloat16", 1, 2, batch_tokens),
        "ours, fp32, 1 x 2 threads": Entry("ours", "float32", 1, 2, batch_tokens),
        "peak, 2 x 1": Entry("peak", "bfloat16", 2, 1),
        "peak, 1 x 2": Entry("peak", "bfloat16", 1, 2),
    }


def measure(options: argparse.Namespace, part: Part, contest: Contest) -> None:
    """Tune, compete, and draw the figures from it."""
    best, tuning = tune(contest, min(options.tune_rows, contest.num_rows))
    named = choose(best, options.batch_tokens)
    rates, said = compete(contest, list(named.values()), options.repeats)
    rows = {name: spread(rates[entry]) for name, entry in named.items() if entry.way != "peak"}
    middle = {name: one["median"] for name, one in rows.items()}
    work, tokens = count_work(contest.config, contest.sample)
    peaks = [
        max(sum(r["flops"] for r in replies) for replies in said[named[name]])
        for name in ("peak, 2 x 1", "peak, 1 x 2")
    ]
    share = middle["ours, bf16"] * work / contest.num_rows / max(peaks)
    plain = max(middle["plain, fp32"], middle["plain, bf16"])
    part.figures += [
        Figure("ours bf16 / plain sorted, better of its dtypes", middle["ours, bf16"] / plain, "x", 4),
        Figure("ours bf16 / plain file order", middle["ours, bf16"] / middle["plain, file order"], "x", 12),
        Figure("ours fp32 / plain sorted fp32", middle["ours, fp32"] / middle["plain, fp32"], "x", 2.5),
        Figure("ours bf16 / plain sorted in 2 processes", middle["ours, bf16"] / middle["plain, 2 processes"], "x"),
        Figure("share of the bf16 matmul peak", 100 * share, "%", 35, note=f"of {max(peaks) / 1e9:.0f} GFLOP/s"),
        Figure("ours bf16", middle["ours, bf16"], "conversations/s"),
        Figure("ours bf16", middle["ours, bf16"] * tokens / contest.num_rows, "tokens/s"),
    ]  # fmt: skip
    stages = share_by_stage(said[named["ours, bf16"]])
    part.details |= {
        "rows": contest.num_rows,
        "tokens": tokens,
        "flop_per_token": work / tokens,
        "peak_flops": {"2 x 1": peaks[0], "1 x 2": peaks[1]},
        "contestants": {name: entry.name for name, entry in named.items()},
        "conversations_per_s": rows,
        "stages_percent": stages,
        "tuning_conversations_per_s": tuning,
    }
    show_rates(rows, named, tokens / contest.num_rows)
    show("where the time of ours goes", ("stage", "%"), ((k, f"{v:.1f}") for k, v in stages.items()))


def share_by_stage(said: list[list[dict]]) -> dict[str, float]:
    """Return each stage's share of the time, in percent."""
    total: dict[str, float] = defaultdict(float)
    for reply in (one for replies in said for one in replies):
        for stage, seconds in reply.items():
            total[stage] += seconds
    return {stage: 100 * s / sum(total.values()) for stage, s in total.items()}


def explore(options: argparse.Namespace, part: Part, contest: Contest) -> None:
    """Compare ours with itself: tokens in a batch, processes and threads, allocator."""
    entries = {
        entry.name: entry
        for dtype, (processes, threads), malloc, batch in product(
            DTYPES, ((1, 2), (2, 1)), (False, True), options.explore
        )
        for entry in [Entry("ours", dtype, processes, threads, batch, malloc=malloc)]
    }
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
    parser.add_argument("--pool", default=str(tiny.pool_path()))
    parser.add_argument("--lm", default=str(tiny.lm_path()))
    parser.add_argument("--sae", default=str(tiny.sae_path()))
    parser.add_argument("--rows", type=int, default=1500)
    parser.add_argument("--tune_rows", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=5)
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
