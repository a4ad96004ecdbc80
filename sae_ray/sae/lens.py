"""Logit lens: the tokens that a latent's decoder direction speaks for and against.

    logits(d) = W_U (norm(d) - norm(0))

with the model's own final norm and unembedding; what is taken off is the norm's bias, which is no
latent's. Only the lowest layer, the norm and the head are loaded.
"""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae_ray.lm import HookPoint
from sae_ray.sae.splice import WholeModel

_CHUNK = 256


@dataclasses.dataclass(frozen=True, slots=True)
class Promoted:
    """Tokens whose logits a direction moves most."""

    up: list[tuple[int, float]]
    """(token id, logit), largest first."""
    down: list[tuple[int, float]]
    """Smallest first."""


class LogitLens:
    """A model's final norm and head, looked at from a hook point."""

    def __init__(self, model: WholeModel, hook_point: HookPoint) -> None:
        base, family = model.model.base_model, model.family
        head = model.model.get_output_embeddings()
        assert isinstance(head, nn.Module)
        self._norm, self._head = base.get_submodule(family.final_norm), head
        self._into_stream: nn.Module = nn.Identity()
        if hook_point.site == "z":
            layer = base.get_submodule(f"{family.layers}.{hook_point.layer}")
            self._into_stream = layer.get_submodule(family.out_proj)

    @classmethod
    def load(
        cls, path: str | Path, hook_point: HookPoint, *, device: str | torch.device = "cpu"
    ) -> "LogitLens":
        """Load what the lens needs of a model.

        Raises:
            ModelError: there is no such model, or none of a family that is known.
        """
        num_layers = hook_point.num_layers if hook_point.site == "z" else 1
        return cls(WholeModel.load(path, num_layers=num_layers, device=device), hook_point)

    @torch.inference_mode()
    def logits(self, directions: Float[Tensor, "num d_out"]) -> Float[Tensor, "num vocab"]:
        """Return what directions add to the logits, up to a positive factor for each."""
        weight = next(self._head.parameters())
        directions = directions.to(weight.device, weight.dtype)
        stream = _without_bias(self._into_stream, directions)
        return _without_bias(self._head, _without_bias(self._norm, stream)).float()

    def promoted(self, W_dec: Float[Tensor, "d_sae d_out"], num: int = 10) -> Iterator[Promoted]:
        """Yield the tokens that each row of a decoder promotes and suppresses."""
        for start in range(0, len(W_dec), _CHUNK):
            logits = self.logits(W_dec[start : start + _CHUNK])
            up, down = (logits.topk(num, largest=largest) for largest in (True, False))
            for row in range(len(logits)):
                yield Promoted(
                    *(
                        list(zip(one.indices[row].tolist(), one.values[row].tolist(), strict=True))
                        for one in (up, down)
                    )
                )


def _without_bias(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return function(x) - function(torch.zeros_like(x[:1]))
