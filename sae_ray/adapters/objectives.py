"""Objectives: TRL's SFT and DPO trainers over examples, and staying near the base with either."""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainingArguments,
)
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer  # pyright: ignore[reportPrivateImportUsage]
from trl.data_utils import pack_dataset

from sae_ray.adapters.attach import unpenalised
from sae_ray.adapters.examples import Example, PairExample
from sae_ray.adapters.positions import acts_on_answers
from sae_ray.adapters.recipe import Recipe
from sae_ray.adapters.replies import IGNORED, labels_of, padded
from sae_ray.errors import ConfigError
from sae_ray.lm import by_its_old_name


@dataclasses.dataclass(frozen=True)
class World:
    """Which of how many workers this is, and what shards its state."""

    rank: int = 0
    count: int = 1
    deepspeed: dict[str, Any] | None = None
    """DeepSpeed's configuration; without it, the trainer runs in this process alone."""
    gathered: Callable[[list[nn.Parameter]], AbstractContextManager[Any]] = nullcontext
    """Makes sharded parameters whole for a while; all workers call it together."""

    @property
    def zero_stage(self) -> int | None:
        """Return the stage of ZeRO, if DeepSpeed is used."""
        return self.deepspeed["zero_optimization"]["stage"] if self.deepspeed else None


@dataclasses.dataclass
class Retain:
    """Rows on which the model is to stay what it was."""

    rows: Sequence[Example]
    weight: float
    micro_rows: int
    seed: int
    world: World

    def batch(self, number: int) -> list[Example]:
        """Return this worker's rows of a batch, which depend on its number alone."""
        want = self.micro_rows
        first = (number * self.world.count + self.world.rank) * want
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(self.rows), generator=generator).tolist()
        return [self.rows[order[i % len(order)]] for i in range(first, first + want)]


class _Retaining:
    """Adds to a trainer's loss the divergence of the base model from it, on rows to retain."""

    retain: Retain | None = None
    scale_by_accumulation = False
    """Whether the trainer leaves division by the number of accumulated batches to the loss."""
    _seen = (-1, 0)

    def compute_loss(
        self,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the trainer's loss, and in training the weighted divergence with it."""
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # pyright: ignore
        if self.retain is None or not self.model.training:  # pyright: ignore
            return loss
        accumulated = self.args.gradient_accumulation_steps  # pyright: ignore
        step = self.state.global_step  # pyright: ignore
        micro = self._seen[1] + 1 if self._seen[0] == step else 0
        self._seen = (step, micro)
        divergence = self._divergence(model, self.retain.batch(step * accumulated + micro))
        share = self.retain.weight / (accumulated if self.scale_by_accumulation else 1)
        return loss + share * divergence

    def _divergence(self, model: Any, rows: Sequence[Example]) -> Tensor:
        """Return KL(base || model) in nats a learnt token."""
        pad = self.processing_class.pad_token_id  # pyright: ignore
        adapted: PeftModel = self.accelerator.unwrap_model(model)  # pyright: ignore
        return divergence(model, adapted, rows, pad, self.args.device).mean()  # pyright: ignore


def divergence(
    model: Any, adapted: PeftModel, rows: Sequence[Example], pad: int, device: Any
) -> Float[Tensor, " tokens"]:
    """Return KL(base || model) in nats of each learnt token.

    Args:
        model: what is called, however it is wrapped.
        adapted: the model within, whose adapter can be switched off.
        rows: read at once.
        pad: id of the padding token.
        device: where the model is.
    """
    ids, real, learnt = (one.to(device) for one in padded(rows, pad))
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": real.long(), "use_cache": False}
    with torch.no_grad(), adapted.disable_adapter():
        base = model(**inputs).logits[:, :-1][learnt[:, 1:]].float().log_softmax(-1)
    if acts_on_answers(adapted):
        inputs["labels"] = labels_of(ids, learnt)
    with unpenalised(adapted):  # what is asked of the weights is asked once a batch
        tuned = model(**inputs).logits[:, :-1][learnt[:, 1:]].float().log_softmax(-1)
    return (base.exp() * (base - tuned)).sum(-1)


class Sft(_Retaining, SFTTrainer):
    """Learns replies."""

    scale_by_accumulation = True


class Dpo(_Retaining, DPOTrainer):
    """Learns to prefer one reply to another."""

    def _prepare_dataset(self, dataset: Any, *_args: Any, **_kwargs: Any) -> Any:
        return dataset  # token ids already, by our own rule of what a reply is


class Witness:
    """A collator that remembers which rows it gave out first."""

    def __init__(self, collate: Callable[[list], dict[str, Tensor]]) -> None:
        self._collate = collate
        self.digests: list[str] = []

    def __call__(self, rows: list) -> dict[str, Tensor]:
        """Collate rows."""
        batch = self._collate(rows)
        if len(self.digests) < 8:
            ids = batch["input_ids"].contiguous().numpy().tobytes()
            self.digests.append(hashlib.sha256(ids).hexdigest())
        return batch


def dataset_of(
    recipe: Recipe, rows: Sequence[Example] | Sequence[PairExample], max_tokens: int
) -> Dataset:
    """Return what TRL trains on, packed where that is asked for."""
    if recipe.objective == "dpo":
        return Dataset.from_list(list(_pair_columns(rows)))
    dataset = Dataset.from_list(list(_columns(rows)))
    return pack_dataset(dataset, max_tokens, "bfd") if recipe.packing else dataset


def num_steps(recipe: Recipe, num_rows: int) -> int:
    """Return the steps of a training; the rows that do not fill one are left to the next epoch."""
    if num_rows < recipe.batch_rows:
        packed = " once packed" if recipe.packing else ""
        raise ConfigError(
            f"batch_rows={recipe.batch_rows} but there are {num_rows} rows to train on{packed}: "
            "give a smaller batch_rows, or more rows"
        )
    return recipe.max_steps or math.ceil(recipe.num_epochs * num_rows / recipe.batch_rows)


def in_order(dataset: Dataset, num_rows: int, seed: int) -> Dataset:
    """Return so many rows, pass after pass, each pass in an order of its own.

    The steps of a training are cut from this one line, so that a step has the same rows whatever
    the number of workers, also where an epoch ends within it.
    """
    passes = range(math.ceil(num_rows / len(dataset)))
    orders = [np.random.default_rng((seed, one)).permutation(len(dataset)) for one in passes]
    return dataset.select(np.concatenate(orders)[:num_rows])


def evaluate_every(recipe: Recipe, steps: int) -> int:
    """Return the number of steps between looks at the held-out rows."""
    return recipe.evaluate_every or max(1, math.ceil(steps / 4))


def arguments(recipe: Recipe, folder: Path, steps: int, world: World) -> TrainingArguments:
    """Return TRL's settings; made before the model, which ZeRO-3 shards as it is loaded."""
    assert recipe.learning_rate is not None
    micro, accumulated = recipe.micro_rows_for(world.count)
    on_cpu = not torch.cuda.is_available()
    bfloat16 = recipe.dtype == "bfloat16"
    if bfloat16 and on_cpu and world.deepspeed:
        raise ConfigError(
            "dtype=bfloat16 under DeepSpeed needs GPUs: give float32, or num_workers=0 on a CPU"
        )
    common = {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": accumulated,
        "learning_rate": recipe.learning_rate,
        "warmup_steps": round(recipe.warmup_share * steps),
        "lr_scheduler_type": "linear",
        "weight_decay": recipe.weight_decay,
        "max_grad_norm": recipe.max_gradient_norm,
        "optim": "adamw_torch",
        "seed": recipe.seed,
        "data_seed": recipe.seed,
        "train_sampling_strategy": "sequential",  # see in_order
        "bf16": bfloat16,
        "gradient_checkpointing": recipe.gradient_checkpointing,
        "logging_strategy": "steps",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_steps": evaluate_every(recipe, steps),
        "save_total_limit": 1,
        "eval_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_drop_last": True,
        "dataloader_pin_memory": not on_cpu,
        "max_length": None,
        # accelerate drops DeepSpeed without a word where it is told of a CPU.
        "use_cpu": on_cpu and world.deepspeed is None,
        "deepspeed": world.deepspeed,
        # Nor does it see other workers there, unless its state was made for it.
        "accelerator_config": {"use_configured_state": on_cpu and world.deepspeed is not None},
    }
    own = {"shuffle_dataset": False, "dataset_kwargs": {"skip_prepare_dataset": True}}
    with by_its_old_name():
        if recipe.objective == "dpo":
            return DPOConfig(**common, beta=recipe.beta)
        return SFTConfig(**common, **own, padding_free=recipe.packing)


def make_trainer(
    recipe: Recipe,
    args: TrainingArguments,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    *,
    retain: Retain | None = None,
    reference: PreTrainedModel | None = None,
) -> Sft | Dpo:
    """Return TRL's trainer of an objective; `reference` is DPO's where there is no adapter."""
    given: dict[str, Any] = {"model": model, "args": args, "processing_class": tokenizer}
    given["train_dataset"] = in_order(dataset, args.max_steps * recipe.batch_rows, recipe.seed)
    trainer = Dpo(**given, ref_model=reference) if recipe.objective == "dpo" else Sft(**given)
    trainer.remove_callback(PrinterCallback)
    trainer.retain = retain
    trainer.data_collator = Witness(trainer.data_collator)
    return trainer


def _columns(rows: Sequence[Any]) -> Iterator[dict[str, list[int]]]:
    for row in rows:
        labels = [i if one else IGNORED for i, one in zip(row.ids, row.learnt, strict=True)]
        yield {"input_ids": row.ids.tolist(), "labels": [int(label) for label in labels]}


def _pair_columns(rows: Sequence[Any]) -> Iterator[dict[str, list[int]]]:
    for row in rows:
        start = int(row.chosen.learnt.argmax())
        yield {
            "prompt_ids": row.chosen.ids[:start].tolist(),
            "chosen_ids": row.chosen.ids[start:].tolist(),
            "rejected_ids": row.rejected.ids[start:].tolist(),
        }
