"""Health of a training: a loss that is no number or has blown up stops it, with the cause."""

import dataclasses
import math

import torch
from jaxtyping import Float
from torch import Tensor

from sae_ray.errors import TrainingError
from sae_ray.lm import HookPoint
from sae_ray.sae.buffer import TokenBatch
from sae_ray.sae.recipe import SAESpec
from sae_ray.sae.sequences import CONVERSATION, POSITION, TOKEN

SPIKES_THAT_STOP = 5
MASSIVE = 10.0
"""A token is massive, most often an attention sink, at so many times the median norm."""


@dataclasses.dataclass
class Health:
    """The squared error of one SAE so far: unlike the loss, it does not rise with a penalty."""

    mean: float | None = None
    """Running mean, spikes left out."""
    num_spikes: int = 0
    """In a row, up to now."""

    def check(
        self, loss: float, error: float, gradient_norm: float, spike_factor: float
    ) -> str | None:
        """Take in a step; return what is wrong if the training must stop."""
        if not math.isfinite(loss):
            return f"its loss is {loss}"
        if not math.isfinite(gradient_norm):
            return f"its loss is {loss:.4g} but the norm of its gradient {gradient_norm}"
        if self.mean is not None and error > spike_factor * self.mean:
            self.num_spikes += 1
            if self.num_spikes == SPIKES_THAT_STOP:
                return (
                    f"its squared error {error:.4g} is {error / self.mean:.0f} times its running "
                    f"mean, above spike_factor={spike_factor:g} in {SPIKES_THAT_STOP} steps on end"
                )
            return None
        self.num_spikes = 0
        self.mean = error if self.mean is None else 0.95 * self.mean + 0.05 * error
        return None


def require_finite(
    batch: TokenBatch, x: Float[Tensor, "tokens d_in"], point: HookPoint, before: str = ""
) -> None:
    """Refuse activations that are no numbers; `before` is said first.

    Raises:
        TrainingError: it names the first token that has one.
    """
    wrong = ~x.isfinite().all(dim=-1)
    if wrong.any():
        raise TrainingError(
            f"{before}the model's activations at {point} are not finite, first at "
            f"{_token(batch, int(wrong.int().argmax()))}: read it in float32, or leave that "
            "conversation out"
        )


def _token(batch: TokenBatch, row: int) -> str:
    lane = batch.lanes[row].tolist()
    return f"conversation {lane[CONVERSATION]}, position {lane[POSITION]}, token id {lane[TOKEN]}"


def stop(
    number: int, spec: SAESpec, wrong: str, batch: TokenBatch, *, scale: float, rate: float
) -> None:
    """Stop a training.

    Raises:
        TrainingError: always; it names the step, the SAE, and the cause as far as it shows.
    """
    x = batch.activations[spec.hook_point]
    norms = x.float().norm(dim=-1) * scale / x.shape[1] ** 0.5
    where = int(norms.argmax())
    if float(norms[where]) > MASSIVE:
        cause = (
            f"the batch holds an activation of {float(norms[where]):.0f} times the typical norm, "
            f"at {_token(batch, where)}: lower learning_rate={rate:.2g} or clip_norm, or leave it "
            "out"
        )
    else:
        cause = f"the activations are sound: lower learning_rate={rate:.2g} or clip_norm"
    raise TrainingError(f"step {number}, SAE {spec.name}: {wrong}; {cause}")


def scale_of(x: Float[Tensor, "tokens d_in"]) -> float:
    """Return the factor that gives tokens a mean norm of sqrt(d_in), massive ones left out.

    A few positions (attention sinks) can be a thousand times as long as the rest: they would
    decide a plain mean.
    """
    norms = x.float().norm(dim=-1)
    usual = norms[norms <= MASSIVE * norms.median()]
    return float(x.shape[1] ** 0.5 / usual.mean())


def geometric_median(
    x: Float[Tensor, "tokens d_in"], *, max_tokens: int = 8192, num_rounds: int = 50
) -> Float[Tensor, " d_in"]:
    """Return the point of least summed distance to the tokens: a mean that no sink can move.

    Source: Weiszfeld's algorithm.
    """
    x = x[:max_tokens].float()
    middle = x.mean(dim=0)
    for _ in range(num_rounds):
        weights = 1 / (x - middle).norm(dim=-1).clamp_min(1e-8)
        moved = (weights @ x) / weights.sum()
        if torch.allclose(moved, middle, rtol=1e-5, atol=0):
            break
        middle = moved
    return middle
