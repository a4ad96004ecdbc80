"""The paper's claim: isolated instances against blocks, at matched L0, in ratios with intervals.

    python tests/benchmarks/fast_claim.py --out claim                 the embedded model, on a CPU
    python tests/benchmarks/fast_claim.py --out claim --device cuda --lm M --pool P --text T

For each regime and seed, SAEs of both architectures and of several penalties are trained from one
forward, and measured on the same held-out conversations, each read alone. Errors (eq. 7) are then
interpolated to one L0 that all of them reach, log against log, and divided seed by seed; intervals
are t intervals over seeds of the log ratio, on the same held-out conversations. The recipe is our
default one, for all regimes alike; the paper's has batches of 128 tokens. Needs torch, transformers
and sae-lens, but not Ray.

Source: FAST, arXiv 2506.07691, tables 3-9 (which are not at matched L0).
"""

import argparse
import itertools
import json
import math
import tempfile
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from scipy.stats import t as student

from sae_ray import tiny
from sae_ray.chat import ChatTokenizer
from sae_ray.lm import HookPoint, LanguageModel, load_config
from sae_ray.pool import plan
from sae_ray.rows import PLAIN_FORMS
from sae_ray.sae.activations import ActivationStream, Feed
from sae_ray.sae.encoder import LatentEncoder
from sae_ray.sae.quality import Quality, measure_saes
from sae_ray.sae.recipe import Recipe, SAESpec
from sae_ray.sae.sequences import Arrangement, Lanes, Regime
from sae_ray.sae.shards import InstanceReader
from sae_ray.sae.train import Trainer, train
from sae_ray.tiny.split import is_held_out

ARCHITECTURES = ("standard", "jumprelu")
PARTS = ("special and role", "all", "content", "position 0", "all but position 0")
PAPER = {
    ("standard", "bt_f", "all"): 0.977,
    ("standard", "bt_f", "special and role"): 0.501,
    ("standard", "bt_p", "all"): 0.813,
    ("standard", "bt_p", "special and role"): 0.120,
    ("jumprelu", "bt_f", "all"): 0.405,
    ("jumprelu", "bt_f", "special and role"): 0.014,
    ("jumprelu", "bt_p", "all"): 0.095,
    ("jumprelu", "bt_p", "special and role"): 0.004,
}
"""Median over 40 models and layers of FAST's MSE over the other's; at whatever L0 each had."""
ROWS_PER_SHARD = 512


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="a folder, or a .json file")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--lm", type=Path, default=tiny.lm_path())
    parser.add_argument("--pool", default=str(tiny.pool_path()), help="conversations")
    parser.add_argument("--text", default=str(tiny.text_path()), help="plain text for bt_p")
    parser.add_argument("--hook_point", default=tiny.HOOK_POINT)
    parser.add_argument("--d_sae", type=int, default=1536, help="8 times the embedded width")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--regimes", default=",".join(get_args(Regime)))
    parser.add_argument("--standard", default="1,2,4,8", help="penalties, a SAE each")
    parser.add_argument("--jumprelu", default="3,10,30,100", help="penalties, a SAE each")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch_tokens", type=int, default=4096)
    parser.add_argument("--max_slices", type=int, default=40, help="slices of 512 rows to read")
    parser.add_argument("--held_out", type=int, default=1500, help="conversations to measure on")
    return parser.parse_args()


class Experiment:
    """What every regime and seed shares: a model, and instances that are tokenised once."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.point = HookPoint.parse(arguments.hook_point)
        self.model = LanguageModel.load(arguments.lm, [self.point], device=arguments.device)
        limit = int(load_config(arguments.lm).max_position_embeddings)
        self.max_tokens, self.block_tokens = min(8192, limit), min(2048, limit)
        tokenizer = ChatTokenizer.load(arguments.lm)
        chats = InstanceReader(tokenizer, is_held_out=is_held_out)
        texts = InstanceReader(tokenizer, plain_text=True)
        slices = plan(arguments.pool, rows_per_shard=ROWS_PER_SHARD).slices
        order = np.random.default_rng(0).permutation(len(slices))[: arguments.max_slices]
        slices = [slices[i] for i in sorted(order.tolist())]
        pages = plan(arguments.text, rows_per_shard=ROWS_PER_SHARD, forms=PLAIN_FORMS).slices
        self.shards = {"chats": chats.shards(slices), "texts": texts.shards(pages)}
        self.held_out: list[Lanes] = [
            one[: self.max_tokens] for one in chats.held_out(slices, arguments.held_out)
        ]

    def specs(self, seed: int) -> list[SAESpec]:
        return [
            SAESpec(
                self.point, architecture, self.arguments.d_sae, sparsity=float(penalty), seed=seed
            )
            for architecture in ARCHITECTURES
            for penalty in getattr(self.arguments, architecture).split(",")
        ]

    def run(self, regime: Regime, seed: int) -> Iterator[dict[str, Any]]:
        """Train and measure one regime with one seed; yield a record a SAE."""
        arguments = self.arguments
        recipe = Recipe(
            num_steps=arguments.steps, batch_tokens=arguments.batch_tokens, dead_after_tokens=10**6
        )
        stream = ActivationStream(
            self.model,
            self.shards["texts" if regime == "bt_p" else "chats"],
            Arrangement(regime, max_tokens=self.max_tokens, block_tokens=self.block_tokens),
            tokens_per_forward=8192,
            seed=seed,
        )
        feed = Feed(stream, batch_tokens=recipe.batch_tokens, buffer_batches=16, seed=seed)
        sample = feed.sample()
        widths = {self.point: sample.activations[self.point].shape[1]}
        trainer = Trainer(self.specs(seed), recipe, widths, device=arguments.device)
        trainer.start(sample)
        started = time.perf_counter()
        last = [step for step in train(trainer, feed)][-1]
        seconds = time.perf_counter() - started
        with tempfile.TemporaryDirectory() as folder:
            saved = trainer.save(Path(folder), model_name=str(arguments.lm))
            encoders = {
                name: LatentEncoder.load(path).to(dtype=torch.float32, device=arguments.device)
                for name, path in saved.items()
            }
        measured = measure_saes(self.model, encoders, self.held_out)
        for spec in trainer.specs:
            yield {
                "regime": regime,
                "seed": seed,
                "architecture": spec.architecture,
                "sparsity": spec.sparsity,
                "tokens_per_s": last.num_tokens / seconds,
                "padding": stream.counts.padding_share,
                "cut_instances": stream.counts.cut_instances,
                "passes": stream.cursor.num_passes,
                **plain(measured[spec.name]),
            }


def plain(quality: Quality) -> dict[str, Any]:
    parts = {name: quality.parts[name] for name in PARTS if name in quality.parts}
    return {
        "l0": quality.l0,
        "fvu": quality.fvu,
        "dead": quality.dead,
        "dense": quality.dense,
        "mse": {name: part.mse_macro for name, part in parts.items()},
        "num_tokens": {name: part.num_tokens for name, part in parts.items()},
    }


Curves = dict[tuple[str, int], list[dict[str, Any]]]


def common_l0(curves: Curves) -> float | None:
    """Return the middle of the L0 range that all of some curves span, if there is one."""
    low = max(1e-3, *(min(one["l0"] for one in curve) for curve in curves.values()))
    high = min(max(one["l0"] for one in curve) for curve in curves.values())
    return math.sqrt(low * high) if low <= high else None


def _of(curves: Curves, *regimes: str) -> Curves:
    return {key: curve for key, curve in curves.items() if key[0] in regimes}


def error_at(curve: list[dict[str, Any]], l0: float, part: str) -> float:
    """Interpolate a SAE's error to an L0, log against log."""
    points = sorted((math.log(max(one["l0"], 1e-3)), math.log(one["mse"][part])) for one in curve)
    return math.exp(float(np.interp(math.log(l0), *np.array(points).T)))


def ratios(records: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield fast's error over each other regime's, by architecture and part."""
    for architecture in ARCHITECTURES:
        mine = [one for one in records if one["architecture"] == architecture]
        curves: Curves = {
            (regime, seed): [one for one in mine if (one["regime"], one["seed"]) == (regime, seed)]
            for regime, seed in {(one["regime"], one["seed"]) for one in mine}
        }
        seeds = sorted({seed for regime, seed in curves if regime == "fast"})
        if not seeds:  # run without it: the records are kept, and there is nothing to divide
            continue
        others = [one for one in get_args(Regime)[1:] if (one, seeds[0]) in curves]
        curves = {key: curve for key, curve in curves.items() if key[1] in seeds}
        # Pair by pair: what is on at a token differs too much between all four.
        matched = {other: common_l0(_of(curves, "fast", other)) for other in others}
        for other in [one for one in others if matched[one] is None]:
            spans = {
                key: [one["l0"] for one in curve]
                for key, curve in _of(curves, "fast", other).items()
            }
            print(f"{architecture}: no L0 is reached by fast and {other}: {spans}", flush=True)
        for other, part in itertools.product([o for o in others if matched[o]], PARTS):
            l0 = matched[other]
            assert l0 is not None
            logs = [
                math.log(error_at(curves["fast", seed], l0, part))
                - math.log(error_at(curves[other, seed], l0, part))
                for seed in seeds
            ]
            middle = float(np.mean(logs))
            spread = float(np.std(logs, ddof=1)) if len(seeds) > 1 else 1.0
            quantile = student.ppf(0.975, len(seeds) - 1) if len(seeds) > 1 else math.inf
            half = float(quantile) * spread / len(seeds) ** 0.5
            yield {
                "architecture": architecture,
                "over": other,
                "part": part,
                "l0": l0,
                "ratio": math.exp(middle),
                "low": math.exp(middle - half),
                "high": math.exp(min(700.0, middle + half)),
                "paper": PAPER.get((architecture, other, part)),
            }


def table_row(row: dict[str, Any]) -> tuple[str, str, str, str]:
    """Lay a ratio out as the other benchmarks do theirs."""
    name = f"{row['architecture']}: fast over {row['over']}, {row['part']}, L0 {row['l0']:.0f}"
    span = f"{row['ratio']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
    return name, span, "", "" if row["paper"] is None else f"paper, at any L0: {row['paper']:.3f}"


def show(rows: list[dict[str, Any]], records: list[dict[str, Any]]) -> None:
    print(f"\n{'SAE':9} {'fast over':12} {'tokens':19} {'L0':>6}  ratio of MSE [95 %]   paper")
    for row in rows:
        span = f"{row['ratio']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
        paper = "" if row["paper"] is None else f"{row['paper']:.3f}"
        names = f"{row['architecture']:9} {row['over']:12} {row['part']:19}"
        print(f"{names} {row['l0']:6.1f}  {span:22} {paper}")
    print()
    for regime in dict.fromkeys(one["regime"] for one in records):
        mine: list[Mapping[str, Any]] = [one for one in records if one["regime"] == regime]
        speed = np.median([one["tokens_per_s"] for one in mine])
        print(f"{regime:12} {speed:9,.0f} tokens/s, padding {mine[0]['padding']:.1%}")


def main() -> None:
    arguments = read_arguments()
    given: Path = arguments.out
    out = given if given.suffix == ".json" else given / "fast_claim.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    experiment = Experiment(arguments)
    records: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    # Seed by seed, so that a run that is cut short has whole seeds.
    regimes: list[Regime] = [one for one in get_args(Regime) if one in arguments.regimes.split(",")]
    for seed, regime in itertools.product(range(arguments.seeds), regimes):
        records += experiment.run(regime, seed)
        rows = list(ratios(records)) if regime == regimes[-1] else rows
        report = {
            "command": {name: str(value) for name, value in vars(arguments).items()},
            "device": torch.cuda.get_device_name() if arguments.device != "cpu" else "cpu",
            "finished": datetime.now(UTC).isoformat(),
            "seconds": time.perf_counter() - started,
            "held_out_conversations": len(experiment.held_out),
            "ratios": rows,
            "rows": [table_row(row) for row in rows],
            "saes": records,
        }
        out.write_text(json.dumps(report, indent=1) + "\n")
        l0s = ", ".join(f"{one['l0']:.0f}" for one in records[-len(experiment.specs(0)) :])
        print(f"{report['seconds']:6.0f} s: {regime}, seed {seed}: L0 {l0s}", flush=True)
    show(rows, records)


if __name__ == "__main__":
    main()
