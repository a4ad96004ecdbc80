"""Fine-tuning speed: Ray Train and DeepSpeed against a plain TRL script, and what a latent costs.

    python tests/benchmarks/finetune_speed.py --lm LM --pool POOL --sae SAE --out speed.json

Two processes, warm and asked in turn, train the same LoRA on the same rows in the same order, each
with all cores: a script as TRL's and PEFT's documentation has it, and our trainer as a job runs it,
with one worker. Steps are timed from the fifth to the last. Then one step of every latent adapter
is timed against the same frozen model with one trainable vector in the same place.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from measure import Child, Crew, Figure, Part, add_inputs, answer, child_settings, log, spread
from torch import nn

from sae_ray.adapters.attach import AdapterSpec, attach
from sae_ray.adapters.edits import LATENT_KINDS
from sae_ray.adapters.examples import read_examples
from sae_ray.adapters.finetune import Material
from sae_ray.adapters.loading import load_causal
from sae_ray.adapters.recipe import Recipe
from sae_ray.chat import ChatTokenizer
from sae_ray.sae.pretrained import load_encoder

WARM_UP = 5
BATCH_ROWS, MICRO_ROWS, MAX_TOKENS, RATE = 16, 8, 512, 3e-4
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "33554432", "MALLOC_TRIM_THRESHOLD_": "4294967296"}
STEP_SHAPE = (8, 256)
"""Rows and tokens of a step that is timed alone."""


def prepare_plain(settings: dict) -> Callable[[dict], dict]:
    """Make ready what a user of TRL and PEFT would write."""
    from datasets import Dataset  # noqa: PLC0415 - loads what only this side needs
    from peft import LoraConfig  # noqa: PLC0415
    from transformers import (  # noqa: PLC0415
        AutoModelForCausalLM,
        AutoTokenizer,
        TrainerCallback,
    )
    from trl import SFTConfig, SFTTrainer  # noqa: PLC0415  # pyright: ignore

    table = pq.read_table(settings["sample"])
    order = np.random.default_rng((0, 0)).permutation(table.num_rows)
    rows = table.take(order).to_pylist()  # as `in_order` has them: the same rows in every step
    dataset = Dataset.from_list(
        [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in rows]
    )
    tokenizer = AutoTokenizer.from_pretrained(settings["lm"])
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    def repeat(request: dict) -> dict:
        ends.clear()
        with tempfile.TemporaryDirectory() as folder:
            args = SFTConfig(
                output_dir=folder,
                max_steps=settings["steps"],
                per_device_train_batch_size=MICRO_ROWS,
                gradient_accumulation_steps=BATCH_ROWS // MICRO_ROWS,
                learning_rate=RATE,
                lr_scheduler_type="linear",
                max_length=MAX_TOKENS,
                gradient_checkpointing=False,
                bf16=False,
                use_cpu=True,
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                seed=0,
                train_sampling_strategy="sequential",
            )
            trainer = SFTTrainer(
                model=AutoModelForCausalLM.from_pretrained(settings["lm"], dtype=torch.float32),
                args=args,
                train_dataset=dataset,
                processing_class=tokenizer,
                peft_config=LoraConfig(
                    r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"
                ),
                callbacks=[Clock()],
            )
            trainer.train()
        return {"seconds": ends[-1] - ends[WARM_UP - 1]}

    return repeat


def prepare_ours(settings: dict) -> Callable[[dict], dict]:
    """Make ready a driver, and Ray with it: a step is timed where the driver is told of it."""
    from sae_ray.distributed.finetune import Training, train_expert  # noqa: PLC0415 - loads Ray
    from sae_ray.distributed.runtime import cluster  # noqa: PLC0415

    joined = cluster()
    joined.__enter__()
    tokenizer = ChatTokenizer.load(settings["lm"])
    rows = read_examples(settings["sample"], tokenizer, max_tokens=MAX_TOKENS).rows
    material = Material(rows, rows[:2], [], max_tokens=MAX_TOKENS)

    def repeat(request: dict) -> dict:
        with tempfile.TemporaryDirectory() as folder:
            recipe = Recipe(
                max_steps=settings["steps"],
                evaluate_every=settings["steps"],
                batch_rows=BATCH_ROWS,
                micro_rows=MICRO_ROWS,
                learning_rate=RATE,
            )
            training = Training(
                settings["lm"], AdapterSpec(kind="lora"), recipe, folder, zero_stage=2
            )
            ends = {
                step.number: time.perf_counter()
                for step in train_expert(training, material, num_workers=1)
                if "loss" in step.figures
            }
        return {"seconds": ends[settings["steps"]] - ends[WARM_UP]}

    return repeat


def write_rows(source: str, num_rows: int, tokenizer: ChatTokenizer, path: str) -> int:
    """Write rows of one question and one answer that fit; return their tokens."""
    table = pq.read_table(source, columns=["id", "messages"])
    order = np.random.default_rng(0).permutation(table.num_rows)[: 4 * num_rows]
    table = table.take(np.sort(order))
    pq.write_table(table, path)
    fit = {one.id: one for one in read_examples(path, tokenizer, max_tokens=MAX_TOKENS).rows}
    kept = [
        i
        for i, row in enumerate(table.to_pylist())
        if [turn["role"] for turn in row["messages"]] == ["user", "assistant"] and row["id"] in fit
    ][:num_rows]
    assert len(kept) == num_rows, f"{source} has {len(kept)} such rows of the {num_rows} needed"
    table = table.take(kept)
    pq.write_table(table, path)
    return sum(len(fit[one].ids) for one in table["id"].to_pylist())


def training(options: argparse.Namespace, part: Part) -> None:
    """Let both train in turn."""
    with tempfile.TemporaryDirectory(prefix="sae-ray-") as folder:
        sample = f"{folder}/sample.parquet"
        num_rows = options.steps * BATCH_ROWS
        tokens = write_rows(options.pool, num_rows, ChatTokenizer.load(options.lm), sample)
        given = {"sample": sample, "lm": options.lm, "steps": options.steps}
        crews = {
            side: Crew([Child(__file__, {"side": side, **given}, MALLOC)])
            for side in ("plain", "ours")
        }
        rates: dict[str, list[float]] = {side: [] for side in crews}
        per_step = tokens / options.steps
        for i in range(options.rounds):
            for side, crew in crews.items():
                _, (said,) = crew.run({})
                rates[side].append((options.steps - WARM_UP) * per_step / said["seconds"])
                log(f"round {i + 1} of {options.rounds}: {side} {rates[side][-1]:,.0f} tokens/s")
        for crew in crews.values():
            crew.close()
    found = {side: spread(values) for side, values in rates.items()}
    ours, plain = found["ours"]["median"], found["plain"]["median"]
    part.details["tokens/s"] = found
    part.figures += [
        Figure("SFT of a LoRA, a plain TRL script", plain, "tokens/s"),
        Figure("SFT of a LoRA, Ray Train and DeepSpeed, 1 worker", ours, "tokens/s"),
        Figure("the second over the first", ours / plain, "x", at_least=0.95),
    ]


class OneVector(nn.Module):
    """The least that can be trained: a vector added at a hook point of a frozen model."""

    def __init__(self, model: nn.Module, layer: nn.Module, width: int) -> None:
        super().__init__()
        model.requires_grad_(False)
        self.model, self.vector = model, nn.Parameter(torch.zeros(width))
        layer.register_forward_hook(self._add)

    def _add(self, _module: nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output + self.vector

    def forward(self, **given: Any) -> Any:
        """Run the model."""
        return self.model(**given)


def step_of(model: nn.Module, ids: torch.Tensor) -> Callable[[], None]:
    """Return one step of training."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-3)

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return step


def latents(options: argparse.Namespace, part: Part) -> None:
    """Time a step of each latent adapter, in turn, and look at what it saves."""
    torch.set_num_threads(options.threads)
    point = load_encoder(options.sae).hook_point
    base = load_causal(options.lm, "float32")
    ids = torch.randint(10, int(base.config.vocab_size), STEP_SHAPE)
    layer = base.get_submodule(f"model.layers.{point.layer}")
    steps = {"one vector": step_of(OneVector(base, layer, base.config.hidden_size), ids)}
    for kind in LATENT_KINDS:
        adapted = attach(
            load_causal(options.lm, "float32"), AdapterSpec(kind=kind, sae=(options.sae,))
        )
        steps[kind] = step_of(adapted, ids)
        with tempfile.TemporaryDirectory() as folder:
            adapted.save_pretrained(folder)
            size = Path(folder, "adapter_model.safetensors").stat().st_size
        own = sum(p.numel() for p in adapted.parameters() if p.requires_grad) * 4
        part.details[f"{kind}: bytes saved and of its parameters"] = [size, own]
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(3 + options.latent_rounds):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            if i >= 3:
                seconds[name].append(time.perf_counter() - started)
    middle = {name: float(np.median(s)) for name, s in seconds.items()}
    part.details["seconds a step"] = middle
    for kind in LATENT_KINDS:
        ratio = middle[kind] / middle["one vector"]
        part.figures.append(Figure(f"step of {kind} over one vector's", ratio, "x", at_most=1.25))
    saved = [part.details[f"{kind}: bytes saved and of its parameters"] for kind in LATENT_KINDS]
    beyond = max(size - own for size, own in saved)  # pyright: ignore
    part.figures.append(
        Figure("bytes saved beyond an adapter's parameters, at most", beyond, "B", at_most=4096)
    )


def main() -> None:
    """Measure both."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_inputs(parser)
    parser.add_argument("--steps", type=int, default=30, help="of a turn")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--latent_rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", default="finetune_speed.json")
    options = parser.parse_args()
    part = Part("finetune_speed")
    training(options, part)
    latents(options, part)
    part.write(options.out)


if __name__ == "__main__":
    if settings := child_settings():
        answer({"plain": prepare_plain, "ours": prepare_ours}[settings["side"]](settings))
    else:
        main()
