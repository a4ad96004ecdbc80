"""Drift: what a SAE's latents do on the same rows before and after training, of any adapter.

A label was found on the base. Where a latent still rises and falls with what it did there
(correlation over tokens) and is still on where it was, the label goes on being true.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from sae_ray.adapters.examples import Example
from sae_ray.adapters.replies import labels_of, padded
from sae_ray.explain.dial import by_length
from sae_ray.lm import HookPoint, family_of, visiting
from sae_ray.sae.encoder import LatentEncoder

TRUE_FROM = 0.7
"""Correlation from which a latent is held to be the one that it was."""
_LATENTS_AT_ONCE = 4096

PerLatent = Float[np.ndarray, " d_sae"]


@dataclasses.dataclass(frozen=True)
class Drift:
    """Of every latent, over all tokens of some rows but the first, at which attention sinks lie."""

    num_tokens: int
    density: PerLatent
    """Share of tokens at which it is on in the base."""
    density_after: PerLatent
    mean: PerLatent
    mean_after: PerLatent
    correlation: PerLatent
    """Of its activations before and after; not a number where either never changes."""
    kept: PerLatent
    """Of the tokens at which it was on, the share at which it still is; not a number if none."""


@torch.no_grad()
def drift(
    model: PeftModel,
    encoder: LatentEncoder,
    rows: Sequence[Example],
    *,
    pad: int,
    point: HookPoint | None = None,
    batch_tokens: int = 2048,
) -> Drift:
    """Read rows with an adapter and without it, and compare every latent.

    Args:
        model: with its adapter.
        encoder: of the SAE whose latents are looked at.
        rows: what is read.
        pad: token that fills up batches.
        point: where it is read; the SAE's own hook point unless given.
        batch_tokens: tokens of a forward, padding included.
    """
    device, point = next(model.parameters()).device, point or encoder.hook_point
    encoder = encoder.to(dtype=torch.float32, device=device)
    sums = torch.zeros(8, encoder.d_sae, dtype=torch.float64, device=device)
    num_tokens = 0
    for numbers in by_length([len(row.ids) for row in rows], batch_tokens):
        batch = [rows[i] for i in numbers]
        ids, real, learnt = (one.to(device) for one in padded(batch, pad))
        with model.disable_adapter():
            before = _read(model, point, ids, real, learnt)
        after = _read(model, point, ids, real, learnt)
        num_tokens += len(before)
        for low in range(0, encoder.d_sae, _LATENTS_AT_ONCE):
            chosen = np.arange(low, min(low + _LATENTS_AT_ONCE, encoder.d_sae))
            a, b = (encoder.encode(x, chosen).double() for x in (before, after))
            on, still = a > 0, b > 0
            columns = (
                a,
                b,
                a * a,
                b * b,
                a * b,
                on.double(),
                still.double(),
                (on & still).double(),
            )
            sums[:, low : low + len(chosen)] += torch.stack([one.sum(0) for one in columns])
    a, b, aa, bb, ab, on, still, both = sums.cpu().numpy()
    num = max(num_tokens, 1)
    covariance = ab / num - a * b / num**2
    spread = np.sqrt(np.maximum((aa / num - (a / num) ** 2) * (bb / num - (b / num) ** 2), 0))
    nothing = np.full_like(a, np.nan)
    return Drift(
        num_tokens=num_tokens,
        density=on / num,
        density_after=still / num,
        mean=a / num,
        mean_after=b / num,
        correlation=np.divide(covariance, spread, out=nothing.copy(), where=spread > 1e-12),
        kept=np.divide(both, on, out=nothing.copy(), where=on > 0),
    )


def _read(
    model: PeftModel, point: HookPoint, ids: Tensor, real: Tensor, learnt: Tensor
) -> Float[Tensor, "tokens d_in"]:
    """Return the activations of real tokens but the first, as the model goes on with them."""
    seen: list[Tensor] = []

    def visit(x: Tensor) -> Tensor:
        seen.append(x)
        return x

    whole = model.get_base_model()
    assert isinstance(whole, PreTrainedModel)
    with visiting(whole.get_decoder(), family_of(whole.config.get_text_config()), point, visit):
        labels = labels_of(ids, learnt)
        model(input_ids=ids, attention_mask=real.long(), labels=labels, use_cache=False)
    return seen[-1][:, 1:][real[:, 1:]].float()
