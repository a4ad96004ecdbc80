"""Training speed and quality against sae-lens' own trainer, in one process and one run.

    python tests/benchmarks/train_speed.py --lm LM --pool POOL --out train_speed.json

Same model, conversations, SAE (TopK), batch and threads. sae-lens is fed by its own activation
store over the same conversations with the template; its store's batch and its precision are
searched first, and the best taken. Contestants take turns (A B C A B C ...), so that a change in
the machine's load meets all of them, and each is given as the median of its turns.
"""

import argparse
import contextlib
import dataclasses
import gc
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from measure import Figure, Part, add_inputs

from sae_ray import tiny
from sae_ray.chat import ChatTokenizer
from sae_ray.distributed.runtime import cluster
from sae_ray.distributed.saes import SAERun
from sae_ray.distributed.train import train_parts
from sae_ray.lm import HookPoint, LanguageModel, fast_dtype, load_config
from sae_ray.pool import plan
from sae_ray.sae.activations import ActivationStream, Feed, read_sequences
from sae_ray.sae.encoder import LatentEncoder
from sae_ray.sae.quality import measure_saes
from sae_ray.sae.recipe import Recipe, SAESpec, grid
from sae_ray.sae.sequences import TOKEN, Arrangement, Lanes, Regime
from sae_ray.sae.settings import TrainSettings
from sae_ray.sae.shards import InstanceReader
from sae_ray.sae.train import Trainer, in_shards, train
from sae_ray.tiny.split import is_held_out

K = 32
CONTEXT = 256
REFILL = 4
"""Batches in half of the buffer."""
FAST: Any = fast_dtype()
IS_FAST = FAST == "bfloat16"
"""What this machine multiplies fastest: bf16 that it only emulates takes many times longer."""
SEVEN_B = {"d_model": 3584, "d_ff": 18944, "d_kv": 512, "layers": 28, "length": 512}
"""Qwen2.5-7B's shape."""


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add_inputs(parser)
    parser.add_argument("--out", required=True)
    parser.add_argument("--hook_point", default=tiny.HOOK_POINT)
    parser.add_argument("--d_sae", type=int, default=2048)
    parser.add_argument("--batch_tokens", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=2 * REFILL, help="of a turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quality_steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scaling_steps", type=int, default=60)
    return parser.parse_args()


class Contest:
    """What the contestants share."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.lm = arguments.lm or str(tiny.lm_path())
        self.point = HookPoint.parse(arguments.hook_point)
        pool = arguments.pool or str(tiny.pool_path())
        self.tokenizer = ChatTokenizer.load(self.lm)
        reader = InstanceReader(self.tokenizer, is_held_out=is_held_out)
        limit = int(load_config(self.lm).max_position_embeddings)
        self.instances: list[Lanes] = []
        slices = plan(pool, rows_per_shard=512).slices
        for shard in reader.shards(slices):
            if len(self.instances) >= arguments.rows:
                break
            self.instances += [one[:limit] for one in shard()]
        self.held_out = [one[:limit] for one in reader.held_out(slices, 400)]
        self.d_in = load_config(self.lm).hidden_size
        self.recipe = Recipe(arguments.quality_steps, batch_tokens=arguments.batch_tokens)
        self.spec = SAESpec(self.point, "topk", arguments.d_sae, k=K)

    def feed(
        self, points: list[HookPoint], regime: Regime = "fast", dtype: Any = "float32"
    ) -> Feed:
        stream = ActivationStream(
            LanguageModel.load(self.lm, points, dtype=dtype),
            in_shards(self.instances),
            Arrangement(regime, block_tokens=CONTEXT),
        )
        return Feed(stream, batch_tokens=self.recipe.batch_tokens, buffer_batches=8)

    def ours(
        self, specs: list[SAESpec], *, regime: Regime = "fast", compute: Any = "float32"
    ) -> tuple[Trainer, Feed]:
        feed = self.feed(sorted({spec.hook_point for spec in specs}), regime, compute)
        sample = feed.sample()
        widths = {point: x.shape[1] for point, x in sample.activations.items()}
        trainer = Trainer(specs, dataclasses.replace(self.recipe, compute=compute), widths)
        trainer.start(sample)
        return trainer, feed

    def theirs(self, store_batch: int, *, lm: str = "float32", autocast: bool = False) -> Any:
        """Return sae-lens' trainer, fed by its activation store.

        Args:
            store_batch: blocks in a forward of the language model.
            lm: its precision.
            autocast: whether the SAE's products are in bf16.
        """
        from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig  # noqa: PLC0415
        from sae_lens.config import LoggingConfig, SAETrainerConfig  # noqa: PLC0415
        from sae_lens.load_model import HookedProxyLM  # noqa: PLC0415
        from sae_lens.training.activations_store import ActivationsStore  # noqa: PLC0415
        from sae_lens.training.sae_trainer import SAETrainer  # noqa: PLC0415
        from transformers import AutoModelForCausalLM  # noqa: PLC0415

        name = f"model.layers.{self.point.layer}"
        model = AutoModelForCausalLM.from_pretrained(self.lm, dtype=getattr(torch, lm))
        # Tokenised and cut beforehand, which spares it both.
        ids = np.concatenate([one[:, TOKEN] for one in self.instances])
        blocks = ids[: len(ids) // CONTEXT * CONTEXT].reshape(-1, CONTEXT)
        rows = [{"tokens": block} for block in blocks.tolist()]
        batch = self.arguments.batch_tokens
        total = batch * 10_000
        store = ActivationsStore(
            model=HookedProxyLM(model, self.tokenizer.tokenizer, hook_names=[name]),
            dataset=Dataset.from_list(rows),
            streaming=False,
            hook_name=name,
            hook_head_index=None,
            context_size=CONTEXT,
            d_in=self.d_in,
            n_batches_in_buffer=8 * batch // CONTEXT,  # counted in blocks: as many as ours mixes
            total_training_tokens=total,
            store_batch_size_prompts=store_batch,
            train_batch_size_tokens=batch,
            prepend_bos=False,
            normalize_activations="none",
            device=torch.device("cpu"),
            dtype="float32",
            autocast_lm=False,
            sequence_separator_token=None,
        )
        peak = self.recipe.learning_rate_of(self.spec, self.recipe.num_steps // 2)
        config = SAETrainerConfig(
            total_training_samples=batch * self.recipe.num_steps,
            train_batch_size_samples=batch,
            lr=peak,
            lr_end=peak / 10,
            lr_warm_up_steps=round(0.05 * self.recipe.num_steps),
            lr_decay_steps=round(0.2 * self.recipe.num_steps),
            autocast=autocast,
            n_batches_for_norm_estimate=8,
            logger=LoggingConfig(log_to_wandb=False),
        )
        sae = TopKTrainingSAE(
            TopKTrainingSAEConfig(
                d_in=self.d_in,
                d_sae=self.spec.d_sae,
                k=K,
                normalize_activations="expected_average_only_in",
            )
        )
        return SAETrainer(config, sae, store.get_data_loader())


Turn = Callable[[int], object]
"""Takes so many steps."""


def turn_of(trainer: Trainer, feed: Feed) -> Turn:
    def turn(num: int) -> None:
        for _ in range(num):
            trainer.step(next(feed))

    return turn


def turn_of_theirs(trainer: Any) -> Turn:
    def turn(num: int) -> None:
        for _ in range(num):
            trainer._train_step(sae=trainer.sae, sae_in=next(trainer.data_provider))
            trainer.n_training_steps += 1

    return turn


def rates(turns: dict[str, Turn], steps: int, rounds: int, batch_tokens: int) -> dict[str, float]:
    """Let contestants take turns; return the median tokens a second of each."""
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for turn in turns.values():
        turn(2)
    for _ in range(rounds):
        for name, turn in turns.items():
            started = time.perf_counter()
            turn(steps)
            seconds[name].append(time.perf_counter() - started)
    return {name: steps * batch_tokens / statistics.median(s) for name, s in seconds.items()}


def isolation(contest: Contest) -> float:
    """Return the largest difference between activations in a batch and one by one."""
    model = LanguageModel.load(contest.lm, [contest.point])
    some = sorted(contest.instances[:64], key=len)
    worst = 0.0
    for begin in range(0, len(some), 16):
        together = read_sequences(model, some[begin : begin + 16])[contest.point]
        alone = [read_sequences(model, [one])[contest.point] for one in some[begin : begin + 16]]
        worst = max(worst, float((together - torch.cat(alone)).abs().max()))
    return worst


def many(contest: Contest, part: Part) -> None:
    """Eight SAEs from one forward against their parts and against eight runs."""
    layer = max(0, contest.point.layer - 1)
    points = [HookPoint(layer, "resid_post"), contest.point]
    widths = [contest.spec.d_sae // 2, contest.spec.d_sae]
    specs = grid(points, ["topk", "batchtopk"], widths, k=K)
    trainer, feed = contest.ours(specs)
    batch = next(feed)
    alone = [contest.ours([spec]) for spec in specs]
    turns: dict[str, Turn] = {
        "eight together": turn_of(trainer, feed),
        "the forward": lambda num: _consume(feed, num),
        **{
            f"update {i}": (lambda num, one=one: [one.step(batch) for _ in range(num)])
            for i, (one, _) in enumerate(alone)
        },
        **{f"run {i}": turn_of(*pair) for i, pair in enumerate(alone)},
    }
    arguments = contest.arguments
    found = rates(turns, arguments.steps, arguments.rounds, arguments.batch_tokens)
    seconds = {name: 1 / rate for name, rate in found.items()}
    parts = seconds["the forward"] + sum(s for n, s in seconds.items() if n.startswith("update"))
    runs = sum(s for n, s in seconds.items() if n.startswith("run"))
    whole = seconds["eight together"]
    part.figures += [
        Figure("8 SAEs over forward and updates apart", whole / parts, "x", at_most=1.1),
        Figure("8 SAEs over 8 runs, here", whole / runs, "x"),
        Figure("8 SAEs over 8 runs, FLOPs at 7B", seven_b_ratio(), "x", at_most=0.25),
    ]


def _consume(feed: Feed, num: int) -> None:
    for _ in range(num):
        next(feed)


def seven_b_ratio() -> float:
    """Return the FLOPs of 8 sparse SAEs on one forward over those of 8 runs, at the 7B shape.

    A forward to layer l costs 2 FLOPs a weight and attention 4 d length / 2 a layer; an update the
    encoder's product, and 5 products of k columns each (decode, and gradients).
    """
    d, d_ff, d_kv = SEVEN_B["d_model"], SEVEN_B["d_ff"], SEVEN_B["d_kv"]
    layer = 2 * (2 * d * d + 2 * d * d_kv + 3 * d * d_ff) + 2 * d * SEVEN_B["length"]
    depths, widths = (12, 18), (8 * d, 16 * d)
    updates = [2 * d * width + 5 * 2 * d * 64 for width in widths]
    together = layer * (max(depths) + 1) + 2 * 2 * sum(updates)
    apart = sum(2 * 2 * layer * (depth + 1) for depth in depths) + 2 * 2 * sum(updates)
    return together / apart


def matmul_peak(d_in: int, d_sae: int, rows: int) -> float:
    """Return the FLOP/s of the encoder's product alone, in fp32."""
    a, b = torch.randn(rows, d_in), torch.randn(d_in, d_sae)
    _ = a @ b
    started, num = time.perf_counter(), 0
    while time.perf_counter() - started < 2:
        _ = a @ b
        num += 1
    return num * 2 * rows * d_in * d_sae / (time.perf_counter() - started)


def speed(contest: Contest, part: Part) -> None:
    arguments = contest.arguments
    batch, rounds = arguments.batch_tokens, arguments.rounds
    # Not its use_sparse_activations: torch 2.13 has no backward of them on CPUs.
    settings: list[dict[str, Any]] = [
        {"store_batch": 8},
        {"store_batch": 32},
        *([{"store_batch": 32, "lm": FAST, "autocast": sae} for sae in (False, True)] * IS_FAST),
    ]
    named = {
        ", ".join(f"{k} {v}" for k, v in one.items()): turn_of_theirs(contest.theirs(**one))
        for one in settings
    }
    # A refill of its buffer is half of it: turns of a multiple of that hold equally many.
    found = rates(named, REFILL, 2, batch)
    best = max(found, key=lambda name: found[name])
    part.details["sae-lens settings tried (tokens/s)"] = found
    part.details["sae-lens at its best"] = best
    turns = {
        "sae-lens": named[best],
        "ours float32": turn_of(*contest.ours([contest.spec])),
        f"ours {FAST}": turn_of(*contest.ours([contest.spec], compute=FAST)),
        "blocks": turn_of(*contest.ours([contest.spec], regime="bt_f", compute=FAST)),
    }
    gc.collect()
    found = rates(turns, arguments.steps, rounds, batch)
    part.details["tokens/s"] = found
    trainer, feed = contest.ours([contest.spec])
    turn_of(trainer, feed)(4)
    padding = feed.stream.counts.padding_share  # pyright: ignore[reportAttributeAccessIssue]
    peak = matmul_peak(contest.d_in, contest.spec.d_sae, batch)
    per_token, ours = _flops(contest), found[f"ours {FAST}"]
    part.figures += [
        Figure("sae-lens' trainer", found["sae-lens"], "tokens/s", note=best),
        Figure("ours, float32", found["ours float32"], "tokens/s"),
        Figure(f"ours, {FAST}", ours, "tokens/s"),
        Figure(f"ours {FAST} over sae-lens", ours / found["sae-lens"], "x", at_least=2),
        Figure("ours float32 over sae-lens", found["ours float32"] / found["sae-lens"], "x"),
        Figure("isolated over blocks", ours / found["blocks"], "x", at_least=0.95),
        Figure("padding", padding, "of slots", at_most=0.05),
        Figure("share of float32 matmul peak", found["ours float32"] * per_token / peak, ""),
    ]


def _flops(contest: Contest) -> float:
    """Return what a token costs: the lower layers, and the SAE's dense and kept products."""
    config = load_config(contest.lm)
    d, layers = config.hidden_size, contest.point.num_layers
    weights = layers * (4 * d * d + 3 * d * config.intermediate_size)
    return 2 * weights + 2 * d * contest.spec.d_sae + 5 * 2 * d * K


def quality(contest: Contest, part: Part) -> None:
    """Train both to the end on as many tokens of the same blocks, and measure both alike."""
    model = LanguageModel.load(contest.lm, [contest.point])
    pairs: list[tuple[float, float]] = []
    for seed in range(contest.arguments.seeds):
        spec = dataclasses.replace(contest.spec, seed=seed)
        trainer, feed = contest.ours([spec], regime="bt_f")
        for _ in train(trainer, feed):
            pass
        torch.manual_seed(seed)
        theirs = contest.theirs(8)
        with contextlib.redirect_stderr(open(os.devnull, "w")):  # its progress bar
            sae = theirs.fit()
        with tempfile.TemporaryDirectory() as folder:
            (ours,) = trainer.save(Path(folder) / "ours", model_name="m").values()
            sae.cfg.metadata.hook_name = str(contest.point)
            sae.save_inference_model(Path(folder) / "theirs")
            encoders = {
                "ours": LatentEncoder.load(ours),
                "theirs": LatentEncoder.load(Path(folder) / "theirs"),
            }
            found = measure_saes(model, encoders, contest.held_out)
        part.details[f"quality, seed {seed}"] = {n: one.headline() for n, one in found.items()}
        pairs.append((found["ours"].fvu, found["theirs"].fvu))
    ratios = [ours / theirs for ours, theirs in pairs]
    part.figures += [
        Figure("FVU, sae-lens' trainer", statistics.mean(theirs for _, theirs in pairs), ""),
        Figure("FVU, ours", statistics.mean(ours for ours, _ in pairs), ""),
        Figure(
            "FVU ours over theirs",
            statistics.mean(ratios),
            "x",
            at_most=1.01,
            note=f"{min(ratios):.3f} to {max(ratios):.3f} over {len(ratios)} seeds",
        ),
    ]


def scaling(contest: Contest, part: Part) -> None:
    """Time steps of the product: Ray Train workers of one thread, two against one."""
    arguments = contest.arguments
    found: list[float] = []
    with cluster(), tempfile.TemporaryDirectory(prefix="sae-ray-") as folder:
        for num in (1, 2):
            settings = TrainSettings(
                lm=contest.lm,
                data=arguments.pool,
                hook_points=[str(contest.point)],
                archs=["topk"],
                widths=[contest.spec.d_sae],
                num_tokens=arguments.scaling_steps * arguments.batch_tokens * num,
                batch_tokens=arguments.batch_tokens,
                num_workers=num,
            )
            run = SAERun(settings, f"{folder}/{num}")
            task = run._task(plan(arguments.pool, rows_per_shard=512))
            ends = [
                (time.perf_counter(), step.num_tokens) for step in train_parts(task, run.path, "m")
            ]
            (started, before), (ended, after) = ends[len(ends) // 4], ends[-1]
            found.append((after - before) / (ended - started))
    part.details["tokens/s of 1 and 2 workers"] = found
    part.figures.append(Figure("2 workers over 1", found[1] / found[0], "x", at_least=1.7))


def main() -> None:
    arguments = read_arguments()
    warnings.simplefilter("ignore")
    part = Part("train_speed")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    contest = Contest(arguments)
    part.figures.append(
        Figure("activations in a batch less alone", isolation(contest), "max abs", at_most=1e-4)
    )
    for measure in (speed, many, quality, scaling):
        measure(contest, part)
    part.write(arguments.out)


if __name__ == "__main__":
    main()
