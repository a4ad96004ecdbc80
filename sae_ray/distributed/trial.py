"""Trial: a training as Ray Tune's worker runs it, a look at a time, one plan after the other."""

import dataclasses
import gc
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from ray.tune import Trainable

from sae_ray.adapters.attach import AdapterSpec
from sae_ray.adapters.finetune import Material
from sae_ray.adapters.recipe import Recipe
from sae_ray.adapters.trial import run_trial
from sae_ray.distributed.finetune import copied
from sae_ray.errors import SaeRayError
from sae_ray.memory import keep_large_blocks

LOSS, LOOK = "loss", "look"
"""What Tune compares trials by, and when: their least loss so far, at their looks."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """One training to be done."""

    number: int
    adapter: AdapterSpec | None
    recipe: Recipe
    data: str
    """Which of the materials."""


@dataclasses.dataclass(frozen=True)
class Workshop:
    """What all trainings share."""

    lm: str
    materials: Mapping[str, Material]
    max_divergence: float = math.inf
    max_failures: int = 3
    """Times that a training is begun anew after its worker died."""


class Training(Trainable):
    """A trial as Tune's worker runs it: a look at a time."""

    def setup(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, config: dict[str, Any], *, workshop: Workshop
    ) -> None:
        """Take the plan; the training begins when its first look is asked for."""
        keep_large_blocks()
        self._workshop = workshop
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take another plan: a worker has torch and its libraries loaded."""
        self.cleanup()
        self._begin(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Train to the next look."""
        try:
            glimpse = next(self._looks, None)
        except SaeRayError as error:
            return {LOSS: math.inf, LOOK: self._number, "failed": str(error), "done": True}
        except (torch.OutOfMemoryError, MemoryError) as error:
            said = str(error).strip().splitlines() or ["out of memory"]
            return {LOSS: math.inf, LOOK: self._number, "failed": said[0], "done": True}
        if glimpse is None:
            return {LOSS: self._least, LOOK: self._number, "ended": True, "done": True}
        glance = glimpse.glance
        if glance.counts:
            self._least = min(self._least, glance.loss)
        self._number += glance.step > 0
        result = {LOSS: self._least, LOOK: self._number, "glimpse": glimpse}
        # Said with the last look: after it there is nothing to be ended early.
        return result | ({"ended": True, "done": True} if glance.step == glance.total else {})

    def cleanup(self) -> None:
        """Stop the training where it is."""
        if self._looks is not None:
            self._looks.close()
        self._looks = None
        gc.collect()  # trainer and model hold each other
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._scratch.cleanup()

    def _begin(self, config: dict[str, Any]) -> None:
        plan: Plan = config["plan"]
        self._scratch = tempfile.TemporaryDirectory(prefix="sae-ray-trial-")
        self._least, self._number = math.inf, 0
        adapter, scratch = plan.adapter, Path(self._scratch.name)
        if adapter is not None and adapter.subspaces:
            here = [copied(url, scratch / f"{i}") for i, url in enumerate(adapter.subspaces)]
            adapter = adapter.model_copy(update={"subspaces": tuple(here)})
        self._looks: Any = run_trial(
            self._workshop.lm,
            adapter,
            plan.recipe,
            self._workshop.materials[plan.data],
            scratch / "training",
            max_divergence=self._workshop.max_divergence,
        )
