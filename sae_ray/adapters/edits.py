"""LatentEdit: what is trained on a SAE's latents, and the change of the activations it makes.

    x' = x + (g(z) - z) @ W_dec,    z = encode(x)

    steering   g(z) = z + b                                        d_sae numbers
    scale      g(z) = (1 + s) * z                                  d_sae
    affine     g(z) = (1 + s) * z + b                              2 d_sae
    residual   g(z) = z + W_2 relu(W_1 z + c_1) + c_2              2 d_sae h + h + d_sae

What the SAE does not explain passes through untouched: this is "SAE plus error" without computing
the error, so that a new edit (b, s, W_2, c_2 = 0) changes no bit, and gradients flow whole.

Steering writes one and the same vector b @ W_dec at every token: nothing is encoded for it.
Source: ISaeRFT (AMindToThink/interpretable-fine-tuning); the form without the error is ours.
"""

from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sae_ray.adapters.frozen_sae import FrozenSae

LatentKind = Literal["steering", "scale", "affine", "residual"]
LATENT_KINDS: tuple[LatentKind, ...] = get_args(LatentKind)


def num_parameters(kind: LatentKind, num_latents: int, hidden: int) -> int:
    """Return how many numbers an edit of so many latents trains."""
    match kind:
        case "steering" | "scale":
            return num_latents
        case "affine":
            return 2 * num_latents
        case "residual":
            return 2 * num_latents * hidden + hidden + num_latents


class LatentEdit(nn.Module):
    """One adapter's edit at one hook point.

    Its parameters lie in it directly, because PEFT takes the adapter's name out of a key only next
    to its end.
    """

    def __init__(
        self, kind: LatentKind, sae: FrozenSae, *, hidden: int, l1: float, edit_penalty: float
    ) -> None:
        """Make an edit that changes nothing.

        Args:
            kind: of the map on latents.
            sae: whose latents.
            hidden: units between latents and latents, for `residual`.
            l1: weight of the sum of |parameter| x length of its decoder row, in the loss.
            edit_penalty: weight of the squared length of the change over that of what it changes.
        """
        super().__init__()
        self.kind: LatentKind = kind
        self.sae = sae
        self.l1 = l1
        self.edit_penalty = edit_penalty
        self.backward_passes = 1
        """Backward passes in one step of the optimiser, over which penalties are shared out."""
        self.is_penalised = True
        """Whether forwards add penalties to the gradient."""
        num = len(sae.W_dec)
        if kind in ("steering", "affine"):
            self.steering = nn.Parameter(torch.zeros(num))
        if kind in ("scale", "affine"):
            self.scale = nn.Parameter(torch.zeros(num))
        if kind == "residual":
            self.down = nn.Parameter(torch.empty(hidden, num))
            nn.init.kaiming_uniform_(self.down, a=5**0.5)
            self.down_bias = nn.Parameter(torch.zeros(hidden))
            self.up = nn.Parameter(torch.zeros(num, hidden))
            self.up_bias = nn.Parameter(torch.zeros(num))

    def forward(
        self, x: Float[Tensor, "batch seq d_in"], mask: Bool[Tensor, "batch seq"] | None
    ) -> Float[Tensor, "*one_or_all d_in"]:
        """Return what is to be added to `x`, in fp32, 0 where the mask is off.

        What is the same at every token comes back once.
        """
        with torch.autocast(x.device.type, enabled=False):
            change = self._decoded(x)
            for factor in (self.sae.scale(x), None if mask is None else mask.unsqueeze(-1)):
                change = change if factor is None else change * factor
            if self.edit_penalty and self.is_penalised:
                change = change.expand(x.shape)
                size = x.detach().float().square().sum()
                weight = 2 * self.edit_penalty / self.backward_passes
                change = _Penalised.apply(change, weight / size * change.detach())
            return change

    def constant(self) -> Float[Tensor, " d_in"]:
        """Return what `steering` adds at every token."""
        return self._shrunk(self.steering) @ self.sae.W_dec

    def _decoded(self, x: Float[Tensor, "batch seq d_in"]) -> Float[Tensor, "*one_or_all d_in"]:
        """Return (g(z) - z) @ W_dec; never a product of tokens x latents that need not be."""
        W_dec = self.sae.W_dec
        match self.kind:
            case "steering":
                return self.constant()
            case "scale":
                return self.sae(x) @ self._scaled()
            case "affine":
                return self.sae(x) @ self._scaled() + self.constant()
            case "residual":
                units = torch.relu(self.sae(x) @ self.down.float().T + self.down_bias.float())
                # (up.T @ W_dec) first: h rows of it, where there would be one of each token.
                written = self._shrunk(self.up, by_row=True).T @ W_dec
                return units @ written + self._shrunk(self.up_bias) @ W_dec

    def _scaled(self) -> Float[Tensor, "d_sae d_in"]:
        """Return what each latent writes, scaled: a product of the decoder, not one of every token,
        whose gradient is then tokens x d_in wide and not tokens x latents."""
        return self._shrunk(self.scale).unsqueeze(1) * self.sae.W_dec

    def _shrunk(self, value: Tensor, *, by_row: bool = False) -> Tensor:
        """Return a parameter in fp32, with the L1 penalty in its gradient."""
        value = value.float()
        if not (self.l1 and self.is_penalised):
            return value
        norms = self.sae.norms.unsqueeze(-1) if by_row else self.sae.norms
        weight = self.l1 / self.backward_passes
        return _Penalised.apply(value, weight * norms * value.detach().sign())


class _Penalised(torch.autograd.Function):
    """The identity, with a penalty's gradient added on the way back.

    A penalty added to the loss elsewhere would read parameters outside a forward, where ZeRO-3
    leaves them empty: it would be 0 without a word.
    """

    @staticmethod
    def forward(ctx, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.view_as(value)

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor, None]:  # pyright: ignore
        (gradient,) = ctx.saved_tensors
        return grad_output + gradient, None
