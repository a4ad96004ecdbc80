"""Factors of a LoRA that are held: frozen for good, down to a core, or drawn to a subspace."""

from typing import Literal

import torch
from jaxtyping import Float
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.utils import parametrize

Factor = Literal["lora_A", "lora_B"]


def factors(
    layer: LoraLayer, name: str
) -> tuple[Float[Tensor, "r d_in"], Float[Tensor, "d_out r"]]:
    """Return lora_A and lora_B of an adapter."""
    A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
    assert isinstance(A, Tensor)
    assert isinstance(B, Tensor)
    return A, B


def freeze_factor(layer: LoraLayer, factor: Factor, name: str) -> None:
    """Freeze a factor of an adapter so that it stays so.

    `requires_grad_(False)` alone is undone by `set_adapter` and at the end of `disable_adapter`.
    PEFT keeps a list of what is to stay frozen through both (MiCA uses it).
    """
    frozen = dict(layer.frozen_peft_weight_names)  # the class's own, until a layer has one
    frozen[name] = (*(one for one in frozen.get(name, ()) if one != factor), factor)
    layer.frozen_peft_weight_names = frozen
    getattr(layer, factor)[name].requires_grad_(False)


class Core(nn.Module):
    """weight = left R: only R is trained, and left R is what is saved and loaded."""

    left: Tensor
    inverse: Tensor

    def __init__(self, left: Float[Tensor, "out r"]) -> None:
        super().__init__()
        self.register_buffer("left", left, persistent=False)
        self.register_buffer("inverse", torch.linalg.pinv(left), persistent=False)

    def forward(self, core: Float[Tensor, "r r"]) -> Float[Tensor, "out r"]:
        """Return the weight."""
        return self.left @ core

    def right_inverse(self, weight: Float[Tensor, "out r"]) -> Float[Tensor, "r r"]:
        """Return the core of a weight in the span of `left`."""
        return self.inverse @ weight

    @classmethod
    def put_on(cls, linear: nn.Module, left: Float[Tensor, "out r"]) -> None:
        """Make a matrix's core its only parameter; to state dicts it stays a plain weight."""
        if parametrize.is_parametrized(linear):
            return
        weight = linear.weight
        assert isinstance(weight, Tensor)
        parametrize.register_parametrization(linear, "weight", cls(left.to(weight)))
        linear.register_state_dict_post_hook(_as_plain)
        linear.register_load_state_dict_pre_hook(_as_core)


_CORE = "parametrizations.weight.original"


def _as_plain(module: nn.Module, state: dict, prefix: str, _local: object) -> None:
    if f"{prefix}{_CORE}" in state:
        del state[f"{prefix}{_CORE}"]
        weight = module.weight
        assert isinstance(weight, Tensor)
        state[f"{prefix}weight"] = weight.detach()


def _as_core(module: nn.Module, state: dict, prefix: str, *_rest: object) -> None:
    if f"{prefix}weight" in state:
        core = module.get_submodule("parametrizations.weight.0")
        assert isinstance(core, Core)
        state[f"{prefix}{_CORE}"] = core.right_inverse(state.pop(f"{prefix}weight"))


class Leaning:
    """How much the part of an update outside its span weighs in the loss."""

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self.backward_passes = 1
        """Backward passes in one step of the optimiser, over which the weight is shared out."""

    @property
    def share(self) -> float:
        """Return the weight of one backward pass."""
        return self.weight / self.backward_passes


def lean_to(
    layer: LoraLayer,
    name: str,
    directions: Float[Tensor, "d_model r"],
    side: Literal["writers", "readers"],
    weight: float,
) -> None:
    """Add weight * |part of B A outside the span|² to the loss, in the gradients of A and B.

    Both factors must be whole in the backward pass: up to ZeRO-2.
    """
    Q = torch.linalg.qr(directions.float())[0]
    A, B = factors(layer, name)
    leaning = Leaning(weight)
    layer.leaning = leaning  # pyright: ignore[reportAttributeAccessIssue]

    def outside(one: Tensor) -> Tensor:
        return one - Q.to(one) @ (Q.to(one).T @ one)

    def of_A(grad: Tensor) -> Tensor:
        with torch.no_grad():
            if side == "writers":
                return grad + 2 * leaning.share * B.T @ outside(B) @ A
            return grad + 2 * leaning.share * B.T @ B @ outside(A.T).T

    def of_B(grad: Tensor) -> Tensor:
        with torch.no_grad():
            far = A if side == "writers" else outside(A.T).T
            near = outside(B) if side == "writers" else B
            return grad + 2 * leaning.share * near @ far @ far.T

    A.register_hook(of_A)
    B.register_hook(of_B)
