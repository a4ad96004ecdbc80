"""Learner: one SAE in training, its optimiser, and what it has seen of its latents.

The SAE is of sae-lens' training class and its loss is computed there; TopK and its kin are the
sparse subclasses of `sae_ray.sae.sparse_training`. This module imports sae-lens, which takes 8 s:
import it where it is used.
"""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import (
    BatchTopKTrainingSAEConfig,
    GatedTrainingSAE,
    GatedTrainingSAEConfig,
    JumpReLUTrainingSAE,
    JumpReLUTrainingSAEConfig,
    MatryoshkaBatchTopKTrainingSAEConfig,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
    TopKTrainingSAEConfig,
    TrainingSAE,
)
from sae_lens.saes.sae import SAEMetadata, TrainStepInput, TrainStepOutput
from torch import Tensor

from sae_ray.sae.kept import KeptLatents
from sae_ray.sae.recipe import Recipe, SAESpec
from sae_ray.sae.sparse_training import SparseBatchTopK, SparseMatryoshka, SparseTopK

_DENSE_BYTES = {"cpu": 2**22}
"""Dense latents at a time. Many passes go over them: twice as fast where they stay in a cache."""


@dataclasses.dataclass(frozen=True, slots=True)
class Tally:
    """What a batch says of a SAE: tensors that may be averaged over workers."""

    figures: Float[Tensor, " 4"]
    """Loss, squared error, variance of the input, latents on: means over tokens."""
    fired: Float[Tensor, " d_sae"]
    """Share of tokens that each latent is on for."""


class Learner:
    """One SAE in training."""

    def __init__(
        self, spec: SAESpec, recipe: Recipe, d_in: int, device: torch.device | str = "cpu"
    ) -> None:
        self.spec, self.recipe = spec, recipe
        self.scale = 1.0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(spec.seed)
            self.sae = new_sae(spec, recipe, d_in).to(str(device))
        fused = torch.device(device).type in ("cpu", "cuda")
        self.optimiser = torch.optim.Adam(self.sae.parameters(), lr=0.0, fused=fused)
        self.tokens_off = torch.zeros(spec.d_sae, dtype=torch.int64, device=device)

    @torch.no_grad()
    def start_from(self, scale: float, centre: Float[Tensor, " d_in"]) -> None:
        """Set the scale of the input, and the first b_dec in the input's own units."""
        self.scale = scale
        self.sae.b_dec.copy_(centre * scale)

    @property
    def dead(self) -> Tensor:
        """Latents that were off for longer than the recipe allows."""
        return self.tokens_off >= self.recipe.dead_after_tokens

    def gradients(self, x: Float[Tensor, "batch d_in"], step: int) -> Tally:
        """Compute the gradients of a batch."""
        x = x.to(self.sae.dtype) * self.scale
        self.optimiser.zero_grad(set_to_none=True)
        sums = torch.zeros(2, dtype=x.dtype, device=x.device)
        fired = torch.zeros(self.spec.d_sae, dtype=x.dtype, device=x.device)
        for part in x.split(self._rows_at_once):
            output = self._forward(part, step)
            # Losses are means over tokens.
            loss = output.loss * (len(part) / len(x))
            loss.backward()
            with torch.no_grad():
                error = (output.sae_out - part).square().sum() / len(x)
                sums += torch.stack([loss, error])
                fired += _counts(output.feature_acts) / len(x)
        variance = x.var(dim=0, correction=0).sum()
        return Tally(torch.cat([sums, torch.stack([variance, fired.sum()])]), fired)

    def _forward(self, x: Float[Tensor, "rows d_in"], step: int) -> TrainStepOutput:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self._autocasts):
            return self.sae.training_forward_pass(
                TrainStepInput(
                    sae_in=x,
                    coefficients=self._coefficients(step),
                    dead_neuron_mask=self.dead,
                    n_training_steps=step,
                    is_logging_step=False,
                )
            )

    @property
    def _rows_at_once(self) -> int:
        """Few enough rows of dense latents for the cache; kept latents are never dense."""
        if isinstance(self.sae, SparseTopK):
            return self.recipe.batch_tokens
        room = _DENSE_BYTES.get(self.tokens_off.device.type, 2**31)
        return max(128, room // (4 * self.spec.d_sae))

    def shared(self, tally: Tally) -> list[Tensor]:
        """Return what workers have to average, in place, so that they stay the same."""
        gradients = [p.grad for p in self.sae.parameters() if p.grad is not None]
        return [*gradients, tally.figures, tally.fired, *self.sae.buffers()]

    def clip(self) -> Float[Tensor, ""]:
        """Shorten gradients that are too long; return their norm before."""
        return torch.nn.utils.clip_grad_norm_(self.sae.parameters(), self.recipe.clip_norm)

    @torch.no_grad()
    def update(self, fired: Float[Tensor, " d_sae"], step: int, num_tokens: int) -> None:
        """Take a step along the gradients, after a batch of so many tokens."""
        for group in self.optimiser.param_groups:
            group["lr"] = self.recipe.learning_rate_of(self.spec, step)
        self.optimiser.step()
        if self.recipe.unit_norm_decoder:
            self.sae.W_dec.div_(self.sae.W_dec.norm(dim=-1, keepdim=True))
        self.tokens_off = torch.where(fired > 0, 0, self.tokens_off + num_tokens)

    def state_dict(self) -> dict[str, Any]:
        """Return all that the next step depends on."""
        return {
            "sae": {name: tensor.clone() for name, tensor in self.sae.state_dict().items()},
            "optimiser": copy.deepcopy(self.optimiser.state_dict()),
            "tokens_off": self.tokens_off.clone(),
            "scale": self.scale,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from another learner's state."""
        self.sae.load_state_dict(state["sae"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.tokens_off = state["tokens_off"].to(self.tokens_off)
        self.scale = state["scale"]

    def save(self, folder: Path, metadata: dict[str, Any]) -> None:
        """Write sae-lens' inference form, for activations in the model's own scale."""
        sae = copy.deepcopy(self.sae)
        sae.fold_activation_norm_scaling_factor(self.scale)
        sae.cfg.metadata = SAEMetadata(hook_name=str(self.spec.hook_point), **metadata)
        if self.spec.hook_point.site == "z":
            sae.cfg.reshape_activations = "hook_z"
        sae.cfg.device = "cpu"  # where it is loaded is not where it was trained
        sae.save_inference_model(folder)

    @property
    def _autocasts(self) -> bool:
        # The sparse classes choose their own precision; the scattered products are not matmuls.
        return self.recipe.compute == "bfloat16" and not isinstance(self.sae, SparseTopK)

    def _coefficients(self, step: int) -> dict[str, float]:
        weight = self.recipe.sparsity_at(self.spec, step)
        return dict.fromkeys(self.sae.get_coefficients(), weight)


def new_sae(spec: SAESpec, recipe: Recipe, d_in: int) -> TrainingSAE[Any]:
    """Return sae-lens' training class of an architecture, with new weights."""
    common = {
        "d_in": d_in,
        "d_sae": spec.d_sae,
        "decoder_init_norm": recipe.decoder_init_norm,
        "apply_b_dec_to_input": recipe.apply_b_dec_to_input,
    }
    weight = recipe.sparsity_of(spec)
    match spec.architecture:
        case "standard":
            return StandardTrainingSAE(StandardTrainingSAEConfig(**common, l1_coefficient=weight))
        case "gated":
            return GatedTrainingSAE(GatedTrainingSAEConfig(**common, l1_coefficient=weight))
        case "jumprelu":
            return JumpReLUTrainingSAE(
                JumpReLUTrainingSAEConfig(
                    **common,
                    l0_coefficient=weight,
                    jumprelu_bandwidth=recipe.jumprelu_bandwidth,
                    jumprelu_init_threshold=recipe.jumprelu_init_threshold,
                    jumprelu_sparsity_loss_mode="step" if spec.k is None else "quadratic",
                    target_l0=spec.k,
                )
            )
    assert spec.k is not None
    match spec.architecture:
        case "topk":
            sae = SparseTopK(TopKTrainingSAEConfig(**common, k=int(spec.k)))
        case "batchtopk":
            sae = SparseBatchTopK(BatchTopKTrainingSAEConfig(**common, k=spec.k))
        case "matryoshka":
            sae = SparseMatryoshka(
                MatryoshkaBatchTopKTrainingSAEConfig(
                    **common, k=spec.k, matryoshka_widths=spec.matryoshka_widths
                )
            )
    sae.finding_dtype = getattr(torch, recipe.compute)
    return sae


def _counts(latents: Tensor | KeptLatents) -> Tensor:
    """Return how many rows each latent is on in."""
    if isinstance(latents, KeptLatents):
        on = latents.pattern.columns[latents.values > 0]
        return torch.bincount(on, minlength=latents.pattern.d_sae)
    return (latents > 0).sum(dim=0)
