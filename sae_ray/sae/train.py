"""Training of a SAE: sae-lens' training class and losses, as a generator of steps.

sae-lens takes 8 s to import, so that waits until something is trained.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from sae_ray.lm import HookPoint, LanguageModel
from sae_ray.sae.activations import Instance, activation_batches

if TYPE_CHECKING:
    import sae_lens


@dataclasses.dataclass(frozen=True, slots=True)
class TrainConfig:
    """What is trained, and how long."""

    d_sae: int
    k: int
    """Latents on per token, on average over a batch."""
    num_steps: int
    learning_rate: float = 2e-3
    warmup_steps: int = 50
    decay_share: float = 0.3
    """The rate falls linearly to zero over this last share of the steps."""
    dead_after_tokens: int = 200_000
    """A latent that was off for so many tokens is dead, and taught by sae-lens' auxiliary loss."""
    seed: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """What one step reports."""

    number: int
    fvu: float
    """Fraction of variance unexplained in this batch, about its mean."""
    l0: float
    num_dead: int
    learning_rate: float


def train_on_instances(
    lm_path: Path,
    instances: Sequence[Instance],
    hook_point: HookPoint,
    config: TrainConfig,
    out: Path,
    *,
    model_name: str,
    rows_per_batch: int = 2048,
    buffer_tokens: int = 65_536,
) -> Iterator[Step]:
    """Train a SAE on instances of a model and, after the last step, write it to `out`."""
    model = LanguageModel.load(lm_path, [hook_point])
    batches = activation_batches(
        model,
        instances,
        hook_point,
        rows_per_batch=rows_per_batch,
        buffer_tokens=buffer_tokens,
        seed=config.seed,
    )
    sample = next(batches)
    scale = scale_of(sample)
    sae = new_sae(sample, config, model_name=model_name, hook_name=str(hook_point))
    yield from train(sae, batches, config, scale=scale)
    save(sae, out, scale=scale)


def new_sae(
    sample: Float[Tensor, "tokens d_in"],
    config: TrainConfig,
    *,
    model_name: str,
    hook_name: str,
) -> "sae_lens.BatchTopKTrainingSAE":
    """Return an untrained SAE whose decoder bias is the sample's mean, in the model's own scale."""
    from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig  # noqa: PLC0415
    from sae_lens.saes.sae import SAEMetadata  # noqa: PLC0415

    torch.manual_seed(config.seed)
    sae = BatchTopKTrainingSAE(
        BatchTopKTrainingSAEConfig(
            d_in=sample.shape[1],
            d_sae=config.d_sae,
            k=config.k,
            metadata=SAEMetadata(model_name=model_name, hook_name=hook_name),
        )
    )
    with torch.no_grad():
        sae.b_dec.copy_(sample.mean(dim=0) * scale_of(sample))
    return sae


def scale_of(sample: Float[Tensor, "tokens d_in"]) -> float:
    """Return the factor that gives the sample a median norm of sqrt(d_in).

    The median, because a few positions (attention sinks) can be a hundred times longer.
    """
    return float(sample.shape[1] ** 0.5 / sample.norm(dim=-1).median())


def train(
    sae: "sae_lens.BatchTopKTrainingSAE",
    batches: Iterator[Float[Tensor, "batch d_in"]],
    config: TrainConfig,
    *,
    scale: float,
) -> Iterator[Step]:
    """Train the SAE in place on scaled activations; `save` folds the scale into the weights."""
    from sae_lens.saes.sae import TrainStepInput  # noqa: PLC0415

    optimiser = torch.optim.Adam(sae.parameters(), lr=config.learning_rate, betas=(0.9, 0.999))
    tokens_off = torch.zeros(config.d_sae, dtype=torch.long)
    decay_steps = max(1, round(config.decay_share * config.num_steps))
    for number in range(config.num_steps):
        rate = config.learning_rate
        rate *= min(1.0, (number + 1) / config.warmup_steps)
        rate *= min(1.0, (config.num_steps - number) / decay_steps)
        for group in optimiser.param_groups:
            group["lr"] = rate
        x = next(batches) * scale
        dead = tokens_off >= config.dead_after_tokens
        output = sae.training_forward_pass(
            TrainStepInput(
                sae_in=x,
                coefficients={},
                dead_neuron_mask=dead,
                n_training_steps=number,
                is_logging_step=False,
            )
        )
        optimiser.zero_grad(set_to_none=True)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimiser.step()
        on = (output.feature_acts.detach() > 0).sum(dim=0)
        tokens_off = torch.where(on > 0, 0, tokens_off + len(x))
        yield Step(
            number=number,
            fvu=fvu(x, output.sae_out.detach()),
            l0=float(on.sum()) / len(x),
            num_dead=int(dead.sum()),
            learning_rate=rate,
        )


def fvu(x: Float[Tensor, "tokens d_in"], x_hat: Float[Tensor, "tokens d_in"]) -> float:
    """Return the fraction of variance unexplained: squared error over variance about the mean."""
    return float((x - x_hat).pow(2).sum() / (x - x.mean(dim=0)).pow(2).sum())


def save(sae: "sae_lens.BatchTopKTrainingSAE", path: Path, *, scale: float) -> None:
    """Fold the scale in and write sae-lens' inference form (JumpReLU); the SAE is spent then."""
    sae.fold_activation_norm_scaling_factor(scale)
    sae.save_inference_model(path)
