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
import multiprocessing
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
from sae_ray.lm import HookPoint, LanguageModel, load_config
from sae_ray.pool import plan
from sae_ray.sae.activations import ActivationStream, Feed, read_sequences
from sae_ray.sae.encoder import LatentEncoder
from sae_ray.sae.quality import measure_saes
from sae_ray.sae.recipe import Recipe, SAESpec, grid
from sae_ray.sae.sequences import TOKEN, Arrangement, Lanes, Regime
from sae_ray.sae.shards import InstanceReader
from sae_ray.sae.train import Trainer, in_shards, train
from sae_ray.tiny.split import is_held_out

K = 32
CONTEXT = 256
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
    parser.add_argument("--steps", type=int, default=6, help="of a turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quality_steps", type=int, default=150)
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

    def theirs(self, store_batch: int, *, autocast: bool) -> Any:
        """Return sae-lens' trainer, fed by its activation store."""
        from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig  # noqa: PLC0415
        from sae_lens.config import LoggingConfig, SAETrainerConfig  # noqa: PLC0415
        from sae_lens.load_model import HookedProxyLM  # noqa: PLC0415
        from sae_lens.training.activations_store import ActivationsStore  # noqa: PLC0415
        from sae_lens.training.sae_trainer import SAETrainer  # noqa: PLC0415
        from transformers import AutoModelForCausalLM  # noqa: PLC0415

        name = f"model.layers.{self.point.layer}"
        model = AutoModelForCausalLM.from_pretrained(self.lm, dtype=torch.float32)
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
            n_batches_in_buffer=max(4, 8 * batch // (store_batch * CONTEXT)),
            total_training_tokens=total,
            store_batch_size_prompts=store_batch,
            train_batch_size_tokens=batch,
            prepend_bos=False,
            normalize_activations="none",
            device=torch.device("cpu"),
            dtype="float32",
            autocast_lm=autocast,
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
    tried = {
        (size, autocast): turn_of_theirs(contest.theirs(size, autocast=autocast))
        for size in (8, 32)
        for autocast in (False, True)
    }
    named = {f"sae-lens, store of {s}, autocast {a}": turn for (s, a), turn in tried.items()}
    found = rates(named, max(2, arguments.steps // 2), 1, batch)
    best = max(found, key=lambda name: found[name])
    part.details["sae-lens settings tried (tokens/s)"] = found
    part.details["sae-lens at its best"] = best
    turns = {
        "sae-lens": named[best],
        "ours fp32": turn_of(*contest.ours([contest.spec])),
        "ours bf16": turn_of(*contest.ours([contest.spec], compute="bfloat16")),
        "blocks bf16": turn_of(*contest.ours([contest.spec], regime="bt_f", compute="bfloat16")),
    }
    gc.collect()
    found = rates(turns, arguments.steps, rounds, batch)
    part.details["tokens/s"] = found
    trainer, feed = contest.ours([contest.spec])
    turn_of(trainer, feed)(4)
    padding = feed.stream.counts.padding_share  # pyright: ignore[reportAttributeAccessIssue]
    peak = matmul_peak(contest.d_in, contest.spec.d_sae, batch)
    per_token = _flops(contest)
    part.figures += [
        Figure("sae-lens' trainer", found["sae-lens"], "tokens/s", note=best),
        Figure("ours, fp32", found["ours fp32"], "tokens/s"),
        Figure("ours, bf16", found["ours bf16"], "tokens/s"),
        Figure("ours bf16 over sae-lens", found["ours bf16"] / found["sae-lens"], "x", at_least=2),
        Figure("ours fp32 over sae-lens", found["ours fp32"] / found["sae-lens"], "x"),
        Figure(
            "isolated over blocks", found["ours bf16"] / found["blocks bf16"], "x", at_least=0.95
        ),
        Figure("padding", padding, "of slots", at_most=0.05),
        Figure("share of fp32 matmul peak, fp32", found["ours fp32"] * per_token / peak, ""),
    ]


def _flops(contest: Contest) -> float:
    """Return what a token costs: the lower layers, and the SAE's dense and kept products."""
    config = load_config(contest.lm)
    d, layers = config.hidden_size, contest.point.num_layers
    weights = layers * (4 * d * d + 3 * d * config.intermediate_size)
    return 2 * weights + 2 * d * contest.spec.d_sae + 5 * 2 * d * K


def quality(contest: Contest, part: Part) -> None:
    """Train both to the end on as many tokens, with k latents on, and measure both alike."""
    trainer, feed = contest.ours([contest.spec])
    for _ in train(trainer, feed):
        pass
    theirs = contest.theirs(8, autocast=False)
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
        model = LanguageModel.load(contest.lm, [contest.point])
        found = measure_saes(model, encoders, contest.held_out)
    part.details["quality"] = {name: one.headline() for name, one in found.items()}
    part.figures += [
        Figure(
            "FVU, sae-lens' trainer", found["theirs"].fvu, "", note=f"L0 {found['theirs'].l0:.1f}"
        ),
        Figure("FVU, ours", found["ours"].fvu, "", note=f"L0 {found['ours'].l0:.1f}"),
        Figure("FVU ours over theirs", found["ours"].fvu / found["theirs"].fvu, "x", at_most=1.01),
    ]


def _scaling_worker(rank: int, num: int, port: int, arguments: Any, queue: Any) -> None:
    from sae_ray.distributed.train import average  # noqa: PLC0415

    torch.set_num_threads(1)
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]})
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=num
    )
    contest = Contest(arguments)
    trainer, feed = contest.ours([contest.spec])
    trainer.num_workers, trainer.reduce = num, average
    turn = turn_of(trainer, feed)
    turn(2)
    torch.distributed.barrier()
    started = time.perf_counter()
    turn(2 * arguments.steps)
    torch.distributed.barrier()
    if rank == 0:
        tokens = 2 * arguments.steps * arguments.batch_tokens * num
        queue.put(tokens / (time.perf_counter() - started))
    torch.distributed.destroy_process_group()


def scaling(arguments: argparse.Namespace, part: Part) -> None:
    """Two workers of one thread against one of one thread."""
    context = multiprocessing.get_context("spawn")
    found: list[float] = []
    for num in (1, 2):
        queue = context.SimpleQueue()
        port = 21_000 + os.getpid() % 10_000 + num
        workers = [
            context.Process(target=_scaling_worker, args=(rank, num, port, arguments, queue))
            for rank in range(num)
        ]
        for worker in workers:
            worker.start()
        found.append(queue.get())
        for worker in workers:
            worker.join()
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
    for measure in (speed, many, quality):
        measure(contest, part)
    scaling(arguments, part)
    part.write(arguments.out)


if __name__ == "__main__":
    main()
