"""What the processes of the speed benchmark do: the plain way, ours, and bare matrix products."""

import dataclasses
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable

import torch
from measure import read_sample
from torch import nn

from sae_ray.chat import ChatTokenizer, Kind, Tokens
from sae_ray.curate import build, scorer
from sae_ray.curate.block import IndexBlock
from sae_ray.curate.scorer import LatentScorer, ScorerConfig
from sae_ray.pool import plan

STAGES: dict[str, tuple[tuple[object, str], ...]] = {
    "read the pool": ((build, "read"),),
    "tokenise": ((LatentScorer, "_tokenize"),),
    "forward": ((LatentScorer, "_read"),),
    "encode and pool": ((scorer.LatentEncoder, "pool"),),
    "make sparse": ((LatentScorer, "_sparse"), (scorer, "_segments"), (scorer, "_segment_means")),
    "write": ((IndexBlock, "to_table"), (build, "_parquet"), (build, "write_atomically")),
}


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
    weights = [
        p
        for m in model.modules()
        if not isinstance(m, nn.Embedding)
        for p in m._parameters.values()
    ]
    linear = sum(p.numel() for p in weights if p is not None and p.ndim == 2)
    heads = model.config.num_attention_heads
    width = heads * (getattr(model.config, "head_dim", None) or model.config.hidden_size // heads)
    layers = model.config.num_hidden_layers
    attention = sum(2 * width * n * (n + 1) for n in lengths) * layers
    encoder = ours.encoder.d_in * ours.encoder.d_sae
    return 2 * (linear + encoder) * sum(lengths) + attention, sum(lengths)
