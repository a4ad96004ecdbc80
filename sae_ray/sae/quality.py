"""How good a SAE is: variance unexplained, latents on per token, dead and dense latents."""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sae_ray.lm import LanguageModel
from sae_ray.sae.activations import read_sequences
from sae_ray.sae.encoder import LatentEncoder
from sae_ray.sae.sequences import Lanes, length_buckets


@dataclasses.dataclass(frozen=True, slots=True)
class Quality:
    """Measured over tokens that had no part in training."""

    fvu: float
    """Squared error over variance about the mean."""
    l0: float
    dead: float
    """Share of latents that were never on."""
    dense: float
    """Share of latents on for more than a tenth of the tokens."""
    num_tokens: int


def measure_sae(lm_path: Path, sae_path: Path, instances: Sequence[Lanes]) -> Quality:
    """Measure a SAE folder on instances of its model."""
    encoder = LatentEncoder.load(sae_path)
    model = LanguageModel.load(lm_path, [encoder.hook_point])
    groups = length_buckets([len(one) for one in instances], 8192, np.random.default_rng(0))
    return measure(
        encoder,
        (
            read_sequences(model, [instances[i] for i in group])[encoder.hook_point].float()
            for group in groups
        ),
    )


@torch.inference_mode()
def measure(encoder: LatentEncoder, batches: Iterable[Float[Tensor, "_ d_in"]]) -> Quality:
    """Measure a SAE on activations."""
    counts = torch.zeros(encoder.d_sae)
    total = torch.zeros(encoder.d_in, dtype=torch.float64)
    squares = error = 0.0
    num_tokens = 0
    for x in batches:
        counts += (encoder.encode(x) > 0).sum(dim=0)
        error += float((x - encoder.reconstruct(x)).double().pow(2).sum())
        squares += float(x.double().pow(2).sum())
        total += x.double().sum(dim=0)
        num_tokens += len(x)
    variance = squares - float(total.pow(2).sum()) / num_tokens
    return Quality(
        fvu=error / variance,
        l0=float(counts.sum()) / num_tokens,
        dead=float((counts == 0).float().mean()),
        dense=float((counts > 0.1 * num_tokens).float().mean()),
        num_tokens=num_tokens,
    )
