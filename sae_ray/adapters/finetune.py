"""Fine-tuning: a model with an adapter, or all of it, trained on examples as a generator of steps.

    finetuning = Finetuning(lm, adapter, recipe, material, folder)
    for step in finetuning.steps():
        ...
    finetuning.best        what the held-out rows and the plain text say before and at the best step

TRL trains; what is measured is measured here, row by row, at step 0 and every so many steps after
it. What is kept is the model of the best look, as safetensors, beside every checkpoint.
"""

import contextlib
import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)

from sae_ray.adapters.attach import AdapterSpec, share_penalties
from sae_ray.adapters.examples import Example, PairExample
from sae_ray.adapters.loading import adapted, count, load_causal, vectors
from sae_ray.adapters.objectives import (
    Retain,
    World,
    arguments,
    dataset_of,
    evaluate_every,
    make_trainer,
    num_steps,
)
from sae_ray.adapters.positions import acts_on_answers
from sae_ray.adapters.recipe import Recipe
from sae_ray.adapters.replies import Gather, RowLoss, flat, row_losses
from sae_ray.adapters.saving import save_model
from sae_ray.adapters.stepwise import Stepwise
from sae_ray.chat import ChatTokenizer
from sae_ray.errors import ConfigError, TrainingError
from sae_ray.lm import by_its_old_name

BEST = "best"
LOOKS = "looks.json"


@dataclasses.dataclass(frozen=True)
class Material:
    """What is learnt from, and what is looked at."""

    train: Sequence[Example] | Sequence[PairExample]
    held_out: Sequence[Example] | Sequence[PairExample]
    general: Sequence[Example]
    """Plain text, on which forgetting shows."""
    retain: Sequence[Example] = ()
    max_tokens: int = 2048


@dataclasses.dataclass(frozen=True)
class Look:
    """What held-out rows and plain text say at a step, row by row."""

    number: int
    held_out: list[RowLoss]
    """Of pairs: chosen and rejected in turn."""
    general: list[RowLoss]

    def halves(self, objective: str) -> tuple["Look", "Look"]:
        """Return what chooses the best step, and what is kept from that choice, to judge by.

        The lowest of many looks is low by chance too: what has not been chosen by is fair.
        """
        width = 2 if objective == "dpo" else 1
        rows = [self.held_out[i : i + width] for i in range(0, len(self.held_out), width)]
        return tuple(  # pyright: ignore[reportReturnType]
            dataclasses.replace(self, held_out=[one for row in rows[first::2] for one in row])
            for first in (0, 1)
        )

    def loss(self, objective: str) -> float:
        """Return what is to be small: nats a learnt token, or the share of pairs ranked wrong.

        Pairs that are ranked alike are told apart by a small share of their margins.
        """
        if objective == "dpo":
            margins = self.margins()
            wrong = sum(margin <= 0 for margin in margins) / len(margins)
            return wrong - 1e-6 * math.tanh(sum(margins) / len(margins))
        return mean_nats(self.held_out)

    def margins(self) -> list[float]:
        """Return by how many nats each held-out pair's chosen reply is the likelier."""
        pairs = zip(self.held_out[::2], self.held_out[1::2], strict=True)
        return [rejected.nats - chosen.nats for chosen, rejected in pairs]

    def figures(self, objective: str) -> dict[str, float]:
        """Return its means."""
        figures = {"held_out_loss": self.loss(objective)}
        return figures | ({"general_loss": mean_nats(self.general)} if self.general else {})


@dataclasses.dataclass(frozen=True)
class Step:
    """What has happened: a step was taken, the held-out rows were looked at, or both were saved."""

    number: int
    total: int
    figures: dict[str, float] = dataclasses.field(default_factory=dict)
    look: Look | None = None
    checkpoint: Path | None = None


class Finetuning:
    """One training in this process, or this worker's part of one."""

    def __init__(
        self,
        lm: str,
        adapter: AdapterSpec | None,
        recipe: Recipe,
        material: Material,
        folder: Path,
        *,
        world: World | None = None,
        gather: Gather | None = None,
        start_from: Path | None = None,
    ) -> None:
        """Load the model and put the adapter on it.

        Args:
            lm: folder or hub name.
            adapter: what is trained; None trains every weight.
            recipe: how.
            material: on what.
            folder: local, for checkpoints and the best model.
            world: which of how many workers this is.
            gather: takes what a worker holds to all of them.
            start_from: PEFT folder of an adapter to go on from, in place of a new one.

        Raises:
            ModelError, ConfigError: they do not fit each other.
        """
        self.recipe, self.material, self.folder = recipe, material, folder
        self.world, self._gather = world or World(), gather
        dataset = dataset_of(recipe, material.train, material.max_tokens)
        self.total = num_steps(recipe, len(dataset))
        args = arguments(recipe, folder, self.total, self.world)  # before the model: see there
        self.tokenizer = ChatTokenizer.load(lm)
        if retained := bool(material.retain) and recipe.retain_weight > 0:
            require_adapter(adapter or start_from, "retain_weight")
        full = adapter is None and start_from is None
        # What is trained stays float32; under DeepSpeed its engine keeps it so.
        dtype = "float32" if full and self.world.deepspeed is None else recipe.dtype
        base = load_causal(lm, dtype)
        self.num_base_parameters = count(base.parameters())
        torch.manual_seed(recipe.seed)
        with self.world.gathered(vectors(base)):  # the gains of norms, which subspaces are put by
            self.model = adapted(base, adapter, start_from)
        reference = load_causal(lm, dtype) if full and recipe.objective == "dpo" else None
        micro, passes = recipe.micro_rows_for(self.world.count)
        if isinstance(self.model, PeftModel):
            share_penalties(self.model, passes)
        near = Retain(material.retain, recipe.retain_weight, micro, recipe.seed, self.world)
        with by_its_old_name():
            self.trainer = make_trainer(
                recipe,
                args,
                self.model,
                with_pad(self.tokenizer.tokenizer),
                dataset,
                retain=near if retained else None,
                reference=reference,
            )
        self.looks, self.stopped_early = list[Look](), False
        self.num_parameters = count(p for p in self.model.parameters() if p.requires_grad)

    @property
    def best(self) -> Look:
        """Return the look at which one half of the held-out rows was likeliest; never the first."""
        objective = self.recipe.objective
        return min(self.looks[1:], key=lambda look: look.halves(objective)[0].loss(objective))

    def steps(self, checkpoint: Path | None = None) -> Iterator[Step]:
        """Train to the end, from a checkpoint if one is given.

        Raises:
            TrainingError: a loss is no number.
        """
        if checkpoint is not None:
            self._restore(checkpoint)
        every = evaluate_every(self.recipe, self.total)
        run = Stepwise[_Event](lambda happened: self._train(happened, checkpoint))
        with contextlib.closing(run.events()) as events:
            yield from self._follow(events, every)

    def _follow(self, events: "Iterator[_Event]", every: int) -> Iterator[Step]:
        for event in events:
            number = event.number
            if event.kind == "began":
                self._require_shards()
                if not self.looks:
                    yield self._looked(number)
            elif event.kind == "logged":
                _require_number(number, event.figures)
                self._require_own_rows(number)
                yield Step(number, self.total, event.figures)
                if number % every == 0 or number == self.total:
                    yield self._looked(number)
                    self.stopped_early = self._has_no_patience() and number < self.total
            else:
                self._complete(event.folder)
                yield Step(number, self.total, checkpoint=event.folder)
                if self.stopped_early:
                    break

    def save(self, folder: Path) -> None:
        """Write the model of the best look: a PEFT folder, or all weights."""
        shutil.copytree(self.folder / BEST, folder, dirs_exist_ok=True)

    def curves(self) -> list[dict[str, float]]:
        """Return the figures of every step and look so far, also of those before a restart."""
        objective = self.recipe.objective
        rows: dict[int, dict[str, float]] = {}
        for log in self.trainer.state.log_history:
            if "loss" in log:
                rows[int(log["step"])] = {name: float(value) for name, value in log.items()}
        for look in self.looks:
            row = rows.setdefault(look.number, {"step": float(look.number)})
            row |= look.figures(objective)
        return [rows[number] for number in sorted(rows)]

    def look(self, number: int) -> Look:
        """Look at the held-out rows and at plain text, without learning from them."""
        held: Any = self.material.held_out
        rows = flat(held) if self.recipe.objective == "dpo" else held
        trainer = self.trainer
        was_training = trainer.model.training  # pyright: ignore[reportOptionalMemberAccess]
        trainer.model.eval()  # pyright: ignore[reportOptionalMemberAccess]
        micro, _ = self.recipe.micro_rows_for(self.world.count)
        sets = [
            row_losses(
                trainer.model_wrapped,  # pyright: ignore[reportArgumentType]
                one,
                micro_rows=micro,
                pad=self.tokenizer.tokenizer.pad_token_id,  # pyright: ignore[reportArgumentType]
                device=trainer.args.device,
                rank=self.world.rank,
                num_workers=self.world.count,
                gather=self._gather,
                with_labels=acts_on_answers(self.model),
            )
            for one in (rows, self.material.general)
        ]
        trainer.model.train(was_training)  # pyright: ignore[reportOptionalMemberAccess]
        return Look(number, *sets)

    def _train(self, happened: "Callable[[_Event], None]", checkpoint: Path | None) -> None:
        self.trainer.add_callback(_Teller(happened, self))
        with by_its_old_name():
            self.trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

    def _looked(self, number: int) -> Step:
        look = self.look(number)
        self.looks.append(look)
        if number and self.best is look:
            save_model(self.trainer, self.folder / BEST, self.world)
        return Step(number, self.total, look.figures(self.recipe.objective), look=look)

    def _has_no_patience(self) -> bool:
        since = len(self.looks) - 1 - self.looks.index(self.best)
        return self.recipe.patience is not None and since >= self.recipe.patience

    def _complete(self, checkpoint: Path) -> None:
        """Add to the trainer's checkpoint what this class must know to go on."""
        if self.world.rank == 0:
            shutil.copytree(self.folder / BEST, checkpoint / BEST, dirs_exist_ok=True)
            looks = [dataclasses.asdict(look) for look in self.looks]
            (checkpoint / LOOKS).write_text(json.dumps(looks))

    def _restore(self, checkpoint: Path) -> None:
        for one in json.loads((checkpoint / LOOKS).read_text()):
            held, general = ([RowLoss(**row) for row in one[k]] for k in ("held_out", "general"))
            self.looks.append(Look(one["number"], held, general))
        shutil.copytree(checkpoint / BEST, self.folder / BEST, dirs_exist_ok=True)

    def _require_shards(self) -> None:
        """DeepSpeed may be dropped, or see one worker, without a word: see it is what was asked."""
        if self.world.deepspeed is None:
            return
        engine: Any = self.trainer.model_wrapped
        is_one = hasattr(engine, "zero_optimization_stage")
        found = (
            (engine.zero_optimization_stage(), engine.dp_world_size)
            if is_one
            else (type(engine).__name__, self.trainer.accelerator.num_processes)
        )
        wanted = (self.world.zero_stage, self.world.count)
        assert found == wanted, f"asked for ZeRO stage and workers {wanted}, got {found}"

    def _require_own_rows(self, number: int) -> None:
        """Workers that are all given the same rows learn from a part of them alone."""
        if self._gather is None or self.world.count == 1 or number > 1:
            return
        mine = self.trainer.data_collator.digests  # pyright: ignore[reportFunctionMemberAccess, reportAttributeAccessIssue]
        seen = self._gather([mine])
        assert len({json.dumps(one) for one in seen}) > 1, "every worker was given the same rows"


@dataclasses.dataclass(frozen=True)
class _Event:
    kind: str
    number: int
    figures: dict[str, float] = dataclasses.field(default_factory=dict)
    folder: Path = Path()


class _Teller(TrainerCallback):
    """Tells what happens in the trainer's loop, and stops it where that is decided."""

    def __init__(self, happened: Callable[[_Event], None], finetuning: Finetuning) -> None:
        self._happened, self._finetuning = happened, finetuning

    def on_train_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell that the model is ready."""
        self._happened(_Event("began", state.global_step))

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell what a step came to."""
        logs = kwargs["logs"]
        if "loss" in logs:
            figures = {name: float(value) for name, value in logs.items()}
            self._happened(_Event("logged", state.global_step, figures))
            if self._finetuning.stopped_early:
                control.should_save = control.should_training_stop = True

    def on_save(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell where the trainer has put a checkpoint."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        folder.mkdir(parents=True, exist_ok=True)
        self._happened(_Event("saved", state.global_step, folder=folder))


def with_pad(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Let a tokenizer that pads with nothing pad with its last token: no loss looks there."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def require_adapter(adapter: object, setting: str) -> None:
    """Refuse what needs the base model beside the trained one, where there is none."""
    if adapter is None:
        raise ConfigError(
            f"{setting} compares with the base model, which full fine-tuning does not keep: leave "
            "it out, or choose an adapter"
        )


def mean_nats(rows: Sequence[RowLoss]) -> float:
    """Return nats a learnt token over rows."""
    return sum(row.nats for row in rows) / max(1, sum(row.num_tokens for row in rows))


def _require_number(number: int, figures: dict[str, float]) -> None:
    if not math.isfinite(figures["loss"]):
        raise TrainingError(
            f"the loss of step {number} is {figures['loss']}: lower learning_rate (or "
            "max_gradient_norm), or look for rows that are no text"
        )
