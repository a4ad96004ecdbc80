"""Recipes: which SAEs are trained from one stream, and how; FAST's own among them."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Literal

from sae_ray.errors import ConfigError
from sae_ray.lm import HookPoint

Architecture = Literal["standard", "gated", "jumprelu", "topk", "batchtopk", "matryoshka"]

CHOOSES_K: tuple[Architecture, ...] = ("topk", "batchtopk", "matryoshka")
"""Architectures that are told how many latents are on."""


@dataclasses.dataclass(frozen=True, slots=True)
class SAESpec:
    """One SAE of a run."""

    hook_point: HookPoint
    architecture: Architecture
    d_sae: int
    k: int | float | None = None
    """Latents on at a token: exactly (topk), on average over a batch (batchtopk, matryoshka), or
    as the target that a quadratic penalty pulls to (jumprelu)."""
    sparsity: int | float | None = None
    """Weight of the penalty on latents that are on: L1 (standard, gated) or L0 (jumprelu). The
    recipe's where not set."""
    seed: int = 0
    """Decides the first weights."""

    def __post_init__(self) -> None:
        if self.d_sae < 1:
            raise ConfigError(f"d_sae={self.d_sae}: give a width of at least 1")
        if self.architecture in CHOOSES_K and self.k is None:
            raise ConfigError(f"architecture={self.architecture!r} needs k, the latents kept")
        if self.architecture in ("standard", "gated") and self.k is not None:
            raise ConfigError(
                f"k={self.k:g} cannot be set for architecture={self.architecture!r}, whose L0 "
                "follows from its penalty: set sparsity, or choose another architecture"
            )
        if self.architecture in CHOOSES_K and self.sparsity is not None:
            raise ConfigError(
                f"sparsity={self.sparsity:g} has no effect on architecture="
                f"{self.architecture!r}: set k"
            )
        if self.k is not None and not 0 < self.k <= self.d_sae:
            raise ConfigError(
                f"k={self.k:g} of d_sae={self.d_sae}: give more than 0, at most d_sae"
            )
        if self.architecture == "topk" and self.k is not None and self.k != int(self.k):
            raise ConfigError(f"k={self.k:g}: topk keeps a whole number; batchtopk need not")

    @property
    def name(self) -> str:
        """Return what tells it from the others of a grid, fit for the name of a folder."""
        how = "" if self.k is None else f"_k{self.k:g}"
        how += "" if self.sparsity is None else f"_s{self.sparsity:g}"
        return f"{self.hook_point}_{self.architecture}_{self.d_sae}{how}_seed{self.seed}"

    @property
    def matryoshka_widths(self) -> list[int]:
        """Return the nested widths of a Matryoshka SAE: d_sae and its halves, four at most."""
        return sorted({max(1, self.d_sae >> shift) for shift in range(4)})


def grid(
    hook_points: Sequence[HookPoint],
    architectures: Sequence[Architecture],
    widths: Sequence[int],
    *,
    k: int | float | None = None,
    sparsity: int | float | None = None,
    seeds: Sequence[int] = (0,),
) -> list[SAESpec]:
    """Return every combination; `k` and `sparsity` go to the architectures that take them."""
    return [
        SAESpec(
            hook_point,
            architecture,
            d_sae,
            k=None if architecture in ("standard", "gated") else k,
            sparsity=None if architecture in CHOOSES_K else sparsity,
            seed=seed,
        )
        for hook_point, architecture, d_sae, seed in itertools.product(
            hook_points, architectures, widths, seeds
        )
    ]


@dataclasses.dataclass(frozen=True, slots=True)
class Recipe:
    """How the SAEs of a run are trained."""

    num_steps: int
    batch_tokens: int = 4096
    """Tokens of a batch, on each worker."""
    learning_rate: float | None = None
    """Where not set: 4e-4 for 16,384 latents, else in inverse proportion to the root of d_sae."""
    end_rate_share: float = 1.0
    """The rate falls along a cosine to this share of it, before the last linear fall to zero."""
    warmup_share: float = 0.05
    """Share of the steps in which the rate rises from zero."""
    decay_share: float = 0.2
    """Share of the steps in which the rate falls to zero, at the end."""
    sparsity_warmup_share: float = 0.1
    """Share of the steps in which the weight of a penalty rises from zero."""
    l1_sparsity: float = 5.0
    """Default penalty of standard and gated SAEs."""
    l0_sparsity: float = 1.0
    """Default penalty of jumprelu SAEs."""
    clip_norm: float = 1.0
    """Gradients longer than this are shortened."""
    normalise: bool = True
    """Scale activations to a typical norm of sqrt(d_in); folded into the weights that are saved."""
    decoder_init_norm: float | None = 0.1
    """Norm of the decoder's first rows; Kaiming's where None."""
    unit_norm_decoder: bool = False
    """Keep decoder rows at norm 1, as sae-lens did before version 6."""
    apply_b_dec_to_input: bool = True
    jumprelu_bandwidth: float = 0.05
    jumprelu_init_threshold: float = 0.01
    dead_after_tokens: int = 1_000_000
    """A latent that was off for so many tokens counts as dead, and is taught by sae-lens'
    auxiliary loss where its class has one."""
    compute: Literal["float32", "bfloat16"] = "float32"
    """Precision of products of the size of the batch. Weights and thresholds are fp32 always."""
    spike_factor: float = 20.0
    """A squared error so many times its running mean is a spike; five in a row stop the run."""

    def __post_init__(self) -> None:
        for name in ("num_steps", "batch_tokens", "dead_after_tokens"):
            if (value := getattr(self, name)) < 1:
                raise ConfigError(f"{name}={value}: give at least 1")
        if self.warmup_share + self.decay_share > 1:
            raise ConfigError(
                f"warmup_share={self.warmup_share:g} and decay_share={self.decay_share:g} are "
                "more than all steps: lower one"
            )

    def learning_rate_of(self, spec: SAESpec, step: int) -> float:
        """Return the learning rate of a SAE at a step."""
        peak = self.learning_rate or 4e-4 * (2**14 / spec.d_sae) ** 0.5
        warmup, decay = self._steps(self.warmup_share), self._steps(self.decay_share)
        share = min(1.0, (step + 1) / warmup) if warmup else 1.0
        middle = max(1, self.num_steps - warmup - decay)
        along = min(1.0, max(0, step - warmup) / middle)
        share *= 1 - (1 - self.end_rate_share) * (1 - math.cos(math.pi * along)) / 2
        share *= min(1.0, (self.num_steps - step) / decay) if decay else 1.0
        return peak * share

    def sparsity_of(self, spec: SAESpec) -> int | float:
        """Return the final weight of a SAE's penalty."""
        default = self.l0_sparsity if spec.architecture == "jumprelu" else self.l1_sparsity
        return default if spec.sparsity is None else spec.sparsity

    def sparsity_at(self, spec: SAESpec, step: int) -> int | float:
        """Return the weight of a SAE's penalty at a step."""
        warmup = self._steps(self.sparsity_warmup_share)
        return self.sparsity_of(spec) * (min(1.0, step / warmup) if warmup else 1.0)

    def _steps(self, share: float) -> int:
        return round(share * self.num_steps)


def fast_paper(num_tokens: int = 40_960_000) -> Recipe:
    """Return the recipe of FAST's paper, as far as sae-lens 6 has what sae-lens 5 had.

    Not the same: JumpReLU thresholds are trained themselves and not by their logarithms, and the
    gradient along unit-norm decoder rows is not taken out before Adam sees it. The paper's median
    of activations as first b_dec is every recipe's. Its batch is 128 tokens: slow by design.

    Source: FAST, arXiv 2506.07691, appendix C, and sae-lens 5.3.3 whose options it names.
    """
    return Recipe(
        num_steps=max(1, num_tokens // 128),
        batch_tokens=128,
        learning_rate=7e-5,
        end_rate_share=0.1,
        warmup_share=0.05,
        decay_share=0.2,
        sparsity_warmup_share=1 / 32,
        l1_sparsity=5.0,
        l0_sparsity=0.01,
        normalise=False,
        decoder_init_norm=None,
        unit_norm_decoder=True,
        apply_b_dec_to_input=False,
        jumprelu_bandwidth=0.001,
        jumprelu_init_threshold=0.001,
        dead_after_tokens=128_000,
    )
