"""Trial: one fine-tuning of a search, as a generator of looks, and the record that it leaves."""

import dataclasses
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from pydantic import BaseModel, ConfigDict, JsonValue

from sae_ray.adapters.attach import AdapterSpec
from sae_ray.adapters.finetune import Finetuning, Look, Material
from sae_ray.adapters.objectives import divergence
from sae_ray.adapters.recipe import Objective, Recipe
from sae_ray.adapters.replies import RowLoss
from sae_ray.errors import TrainingError

Status = Literal["finished", "pruned", "failed"]
Role = Literal["searched", "reference", "finalist"]
"""Why it was trained: proposed, to compare with (a default LoRA), or again with another seed."""


class Glance(BaseModel):
    """What a trial says on the way."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    step: int
    total: int
    seconds: float
    """Since the trial began to load its model."""
    loss: float
    """Of the half of the held-out rows that chooses: nats a token, or the share ranked wrong."""
    general_loss: float | None
    """Nats a token of plain text."""
    divergence: float | None
    """KL from the base on plain text in nats a token, for dpo."""
    counts: bool
    """Whether it may be chosen: not step 0, and for dpo near enough to the base."""


class Judged(BaseModel):
    """Nats and tokens of rows that choose nothing, in order; of pairs chosen and rejected in turn.

    What is said of a trial is said by these.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    held_out: list[tuple[float, int]]
    general: list[tuple[float, int]]

    @classmethod
    def of(cls, look: Look, objective: Objective) -> "Judged":
        """Keep of a look the half that chooses nothing."""
        rows = look.halves(objective)[1]
        return cls(
            held_out=[(one.nats, one.num_tokens) for one in rows.held_out],
            general=[(one.nats, one.num_tokens) for one in rows.general],
        )

    def look(self, number: int) -> Look:
        """Return it as a look."""
        sets = [[RowLoss(*one) for one in rows] for rows in (self.held_out, self.general)]
        return Look(number, *sets)


class TrialRecord(BaseModel):
    """All that is kept of a trial."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    number: int
    role: Role
    point: dict[str, JsonValue]
    """What was drawn for it."""
    seed: int
    layer: str
    """Where it changes the model: numbers of layers, or all."""
    component: str
    """What of a layer it changes: a site, names of matrices, or all."""
    status: Status
    reason: str | None = None
    """Why it failed."""
    num_parameters: int = 0
    glances: list[Glance] = []
    base: Judged | None = None
    best: Judged | None = None
    """At the least loss that counts; None where there was none."""

    @property
    def chosen(self) -> Glance | None:
        """Return the look at which it is best; None if there is none."""
        return min((one for one in self.glances if one.counts), key=_loss, default=None)

    @property
    def loss(self) -> float | None:
        """Return its least loss on the rows that choose."""
        return None if self.chosen is None else self.chosen.loss

    @property
    def seconds(self) -> float:
        """Return how long it took, from loading the model to the last look."""
        return self.glances[-1].seconds if self.glances else 0.0


@dataclasses.dataclass(frozen=True)
class Glimpse:
    """A glance, and the rows behind it where it is of the base, or of the best so far."""

    glance: Glance
    num_parameters: int
    judged: Judged | None


def run_trial(
    lm: str,
    adapter: AdapterSpec | None,
    recipe: Recipe,
    material: Material,
    folder: Path,
    *,
    max_divergence: float = math.inf,
) -> Iterator[Glimpse]:
    """Train, and yield what is seen at step 0 and at every look after it.

    Whoever iterates may stop at any look: the loss of a look is comparable between trials, since
    no setting of theirs scales it and all look at the same rows.

    Args:
        lm: folder of the model.
        adapter: what is trained; None for every weight.
        recipe: how.
        material: on what; the held-out rows are those of all trials.
        folder: local, for the best model; nothing of it is kept by the record.
        max_divergence: for dpo, KL from the base past which a look does not count.

    Raises:
        TrainingError: a loss is no number.
        ModelError, ConfigError: model and adapter do not fit each other.
    """
    started = time.monotonic()
    finetuning = Finetuning(lm, adapter, recipe, material, folder)
    least = math.inf
    for step in finetuning.steps():
        if step.look is None:
            continue
        glance = _glance(finetuning, step.look, started, max_divergence)
        is_best = glance.counts and glance.loss < least
        least = glance.loss if is_best else least
        wanted = is_best or step.number == 0
        judged = Judged.of(step.look, recipe.objective) if wanted else None
        yield Glimpse(glance, finetuning.num_parameters, judged)


def _glance(finetuning: Finetuning, look: Look, started: float, max_divergence: float) -> Glance:
    objective = finetuning.recipe.objective
    figures: dict[str, float] = look.figures(objective)
    apart = _divergence(finetuning) if objective == "dpo" else None
    loss = look.halves(objective)[0].loss(objective)
    rows = [*look.held_out, *look.general]
    if not all(math.isfinite(one.nats) for one in rows):
        raise TrainingError(
            f"rows that are looked at have no finite loss at step {look.number}: lower "
            "learning_rate"
        )
    return Glance(
        step=look.number,
        total=finetuning.total,
        seconds=time.monotonic() - started,
        loss=loss,
        general_loss=figures.get("general_loss"),
        divergence=apart,
        counts=look.number > 0 and (apart is None or apart <= max_divergence),
    )


@torch.no_grad()
def _divergence(finetuning: Finetuning) -> float | None:
    """Return KL(base || model) on plain text; None where there is none, or no base beside it."""
    model: Any = finetuning.model
    rows = finetuning.material.general
    if not rows or not isinstance(model, PeftModel):
        return None
    was_training = model.training
    model.eval()
    micro = finetuning.recipe.micro_rows_for(1)[0]
    pad: Any = finetuning.tokenizer.tokenizer.pad_token_id
    parts = [
        divergence(model, model, rows[i : i + micro], pad, model.device)
        for i in range(0, len(rows), micro)
    ]
    model.train(was_training)
    return float(torch.cat(parts).mean())


def _loss(glance: Glance) -> float:
    return glance.loss
