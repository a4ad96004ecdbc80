"""Training of SAEs: any number of them from one stream of activations, as a generator of steps.

    feed = Feed(ActivationStream(model, shards), batch_tokens=recipe.batch_tokens)
    trainer = Trainer(grid(points, ["topk", "jumprelu"], [4096, 8192], k=32), recipe, widths)
    trainer.start(feed.sample())
    for step in train(trainer, feed):
        ...
    trainer.save(folder, model_name="...")

sae-lens takes 8 s to import, so that waits until something is trained.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sae_ray.errors import ConfigError
from sae_ray.lm import HookPoint, LanguageModel
from sae_ray.sae.activations import ActivationStream, Feed, Shard
from sae_ray.sae.buffer import TokenBatch
from sae_ray.sae.health import Health, geometric_median, require_finite, scale_of, stop
from sae_ray.sae.recipe import Recipe, SAESpec
from sae_ray.sae.sequences import Lanes

if TYPE_CHECKING:
    from sae_ray.sae.learner import Learner

Reduce = Callable[[list[Tensor]], None]
Guard = Callable[[Callable[[], Any]], Any]
"""Does something on all workers, or raises on all what went wrong on one."""

"""Averages each of the tensors over all workers, in place."""


@dataclasses.dataclass(frozen=True, slots=True)
class Figures:
    """What a step reports of one SAE, over all workers' batches."""

    loss: float
    error: float
    """Squared error of a token, in the scale that is trained in."""
    fvu: float
    """Fraction of variance unexplained in this batch, about its mean."""
    l0: float
    num_dead: int
    num_dense: int
    """Latents on for more than a tenth of this batch."""
    gradient_norm: float
    """Before it is clipped."""
    learning_rate: float


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """What one step reports."""

    number: int
    num_tokens: int
    """Trained on up to and with this step, by all workers."""
    saes: dict[str, Figures]
    """By the name of the spec."""


class Trainer:
    """The SAEs of a run, trained together on the same batches.

    `reduce` is called once a step, with gradients and figures of all SAEs, and must average each
    tensor over the workers in place. Workers then stay equal, and two of them take the step that
    one with twice the batch would (save that BatchTopK and Matryoshka choose what is on within
    each worker's batch).
    """

    def __init__(
        self,
        specs: Sequence[SAESpec],
        recipe: Recipe,
        widths: Mapping[HookPoint, int],
        *,
        device: torch.device | str = "cpu",
        num_workers: int = 1,
        reduce: Reduce | None = None,
        guard: Guard | None = None,
    ) -> None:
        from sae_ray.sae.learner import Learner  # noqa: PLC0415 (sae-lens: see above)

        names = [spec.name for spec in specs]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigError(f"SAE {twice[0]} is asked for twice: give each its own seed")
        self.specs, self.recipe = tuple(specs), recipe
        self.num_workers, self.reduce = num_workers, reduce
        self._guard: Guard = guard or (lambda act: act())
        self.learners: dict[str, Learner] = {
            spec.name: Learner(spec, recipe, widths[spec.hook_point], device) for spec in specs
        }
        self.number = 0
        """Steps taken."""
        self.num_tokens = 0
        """Trained on by all workers."""
        self._health = {name: Health() for name in self.learners}

    def start(self, sample: TokenBatch) -> None:
        """Set each hook point's scale and each SAE's first b_dec, from a sample of tokens."""
        for point in sorted({spec.hook_point for spec in self.specs}):
            x = sample.activations[point]
            self._guard(lambda x=x, point=point: require_finite(sample, x, point))
            scale = scale_of(x) if self.recipe.normalise else 1.0
            shared = [x.new_tensor([scale], dtype=torch.float64), geometric_median(x)]
            if self.reduce:
                self.reduce(shared)
            for learner in self.learners.values():
                if learner.spec.hook_point == point:
                    learner.start_from(float(shared[0]), shared[1])

    def step(self, batch: TokenBatch) -> Step:
        """Train every SAE on a batch.

        Raises:
            TrainingError: a loss is no number, or has blown up; all weights are as before.
        """
        learners = list(self.learners.values())
        tallies = [
            learner.gradients(batch.activations[learner.spec.hook_point], self.number)
            for learner in learners
        ]
        if self.reduce:
            pairs = zip(learners, tallies, strict=True)
            self.reduce([tensor for learner, tally in pairs for tensor in learner.shared(tally)])
        norms = [learner.clip() for learner in learners]
        dead = [learner.dead.sum() for learner in learners]
        dense = [(tally.fired > 0.1).sum() for tally in tallies]
        # One copy from the device a step, whatever the number of SAEs.
        columns = [norms, dead, dense, *zip(*(tally.figures for tally in tallies), strict=True)]
        rows = torch.stack([torch.stack(list(c)).double() for c in columns]).T.tolist()
        figures = [
            self._figures(learner, *row) for learner, row in zip(learners, rows, strict=True)
        ]
        self._stop_if_ill(batch, figures)
        num_tokens = len(batch) * self.num_workers
        for learner, tally in zip(learners, tallies, strict=True):
            learner.update(tally.fired, self.number, num_tokens)
        self.number, self.num_tokens = self.number + 1, self.num_tokens + num_tokens
        named = dict(zip(self.learners, figures, strict=True))
        return Step(self.number - 1, self.num_tokens, named)

    def state_dict(self) -> dict[str, Any]:
        """Return all that the next steps depend on, besides the batches."""
        return {
            "made_for": self._made_for(),
            "number": self.number,
            "num_tokens": self.num_tokens,
            "health": {name: dataclasses.asdict(one) for name, one in self._health.items()},
            "learners": {name: one.state_dict() for name, one in self.learners.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from another trainer's state, to the bit; takes its tensors over.

        Raises:
            ConfigError: it is the state of other SAEs, or of another recipe.
        """
        made_for, given = state["made_for"], self._made_for()
        if made_for != given:
            name = next(name for name in given if made_for.get(name) != given[name])
            raise ConfigError(
                f"{name}={given[name]}, but the checkpoint was made with {made_for.get(name)}: "
                "continue with that, or start anew in another folder"
            )
        self.number, self.num_tokens = state["number"], state["num_tokens"]
        self._health = {name: Health(**one) for name, one in state["health"].items()}
        for name, learner in self.learners.items():
            learner.load_state_dict(state["learners"][name])

    def save(self, folder: Path, *, model_name: str, **metadata: Any) -> dict[str, Path]:
        """Write each SAE as sae-lens does, into a folder of its name, and return the folders."""
        folders = {name: folder / name for name in self.learners}
        for name, learner in self.learners.items():
            learner.save(folders[name], {"model_name": model_name, **metadata})
        return folders

    def _made_for(self) -> dict[str, Any]:
        """Return what a state can only be used with, in plain values."""
        recipe = dataclasses.asdict(self.recipe)
        return {"saes": [spec.name for spec in self.specs], **recipe}

    def _figures(self, learner: "Learner", *row: float) -> Figures:
        norm, dead, dense, loss, error, variance, l0 = row
        return Figures(
            loss=loss,
            error=error,
            fvu=error / variance if variance else float("nan"),
            l0=l0,
            num_dead=int(dead),
            num_dense=int(dense),
            gradient_norm=norm,
            learning_rate=self.recipe.learning_rate_of(learner.spec, self.number),
        )

    def _stop_if_ill(self, batch: TokenBatch, figures: Sequence[Figures]) -> None:
        for learner, one in zip(self.learners.values(), figures, strict=True):
            health = self._health[learner.spec.name]
            wrong = health.check(one.loss, one.error, one.gradient_norm, self.recipe.spike_factor)
            if wrong is None:
                continue
            # Figures are of all workers: the one whose batch is not sound says so first.
            at, said = (
                learner.spec.hook_point,
                f"step {self.number}, SAE {learner.spec.name}: {wrong}; ",
            )
            x = batch.activations[at]
            self._guard(lambda x=x, at=at, said=said: require_finite(batch, x, at, said))
            stop(
                self.number,
                learner.spec,
                wrong,
                batch,
                scale=learner.scale,
                rate=one.learning_rate,
            )


def train(trainer: Trainer, batches: Iterator[TokenBatch]) -> Iterator[Step]:
    """Train until the recipe's last step, from wherever the trainer stands."""
    while trainer.number < trainer.recipe.num_steps:
        yield trainer.step(next(batches))


def train_on_instances(
    lm_path: Path,
    instances: Sequence[Lanes],
    spec: SAESpec,
    recipe: Recipe,
    out: Path,
    *,
    model_name: str,
    device: str = "cpu",
    buffer_batches: int = 32,
    seed: int = 0,
) -> Iterator[Step]:
    """Train one SAE on instances of a model in this process and, at the end, write it to `out`."""
    model = LanguageModel.load(lm_path, [spec.hook_point], device=device)
    stream = ActivationStream(model, in_shards(instances), seed=seed)
    feed = Feed(stream, batch_tokens=recipe.batch_tokens, buffer_batches=buffer_batches, seed=seed)
    sample = feed.sample()
    widths = {point: x.shape[1] for point, x in sample.activations.items()}
    trainer = Trainer([spec], recipe, widths, device=model.device)
    trainer.start(sample)
    yield from train(trainer, feed)
    trainer.learners[spec.name].save(out, {"model_name": model_name})


def in_shards(instances: Sequence[Lanes], rows_per_shard: int = 1024) -> list[Shard]:
    """Cut instances that are in memory into shards."""
    begins = range(0, len(instances), rows_per_shard)
    return [functools.partial(_slice, instances, begin, rows_per_shard) for begin in begins]


def _slice(instances: Sequence[Lanes], begin: int, num: int) -> Sequence[Lanes]:
    return instances[begin : begin + num]
