"""Merging of a steering edit into a bias: refused where that would not give the same model."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from sae_ray.adapters.projections import PROJECTIONS, layers_path
from sae_ray.errors import ModelError
from sae_ray.lm import HookPoint


class Biases:
    """What was added to which bias: taken back to the bit, in whatever order."""

    def __init__(self) -> None:
        self._of: dict[nn.Parameter, tuple[Tensor, dict[tuple[int, str], Tensor]]] = {}

    @torch.no_grad()
    def add(self, key: tuple[int, str], bias: nn.Parameter, change: Tensor) -> None:
        """Add to a bias, under a key."""
        _, changes = self._of.setdefault(bias, (bias.detach().clone(), {}))
        changes[key] = change.to(bias)
        bias.add_(changes[key])

    @torch.no_grad()
    def remove(self, key: tuple[int, str]) -> None:
        """Make every bias what it is without what was added under a key."""
        for bias, (before, changes) in self._of.items():
            if changes.pop(key, None) is not None:
                bias.copy_(before)
                for change in changes.values():
                    bias.add_(change)


def bias_of(
    model: PreTrainedModel, point: HookPoint, constant: Float[Tensor, " d_in"]
) -> tuple[nn.Parameter, Tensor]:
    """Find the bias that adds a constant at a hook point, and what it must grow by.

    Raises:
        ModelError: no bias does, and why.
    """
    if point.site == "resid_pre" and point.layer > 0:
        point = HookPoint(point.layer - 1, "resid_post")
    config = model.config.get_text_config()
    attn, mlp = PROJECTIONS[config.model_type].writers
    writer = attn if point.site in ("attn_out", "z") else mlp
    if point.site == "resid_pre":
        raise ModelError(
            f"{_CANNOT} {point}: the embedding that enters the first layer has no bias; {_INSTEAD}"
        )
    path = f"{layers_path(model)}.{point.layer}.{writer.path}"
    module = model.get_submodule(path)
    bias, weight = module.bias, module.weight
    if bias is None:
        raise ModelError(f"{_CANNOT} {point}: {path} has no bias to take it; {_INSTEAD}")
    if writer.norm is not None and point.site != "z":
        raise ModelError(
            f"{_CANNOT} {point}: {writer.norm} lies between {path} and the stream; {_INSTEAD}"
        )
    assert isinstance(bias, nn.Parameter)
    assert isinstance(weight, Tensor)
    if point.site == "z":  # it goes through the matrix on its way; GPT-2 keeps that transposed
        transposed = isinstance(module, nn.Linear)
        constant = (weight if transposed else weight.T).float() @ constant
    return bias, constant


_CANNOT = "a steering edit cannot be merged into the model at"
_INSTEAD = "use the adapter as it is, or unload() for the model without it"
