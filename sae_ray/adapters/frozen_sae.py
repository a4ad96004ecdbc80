"""FrozenSae: a SAE inside a model, as buffers that move with it and are never saved."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae_ray.errors import ModelError
from sae_ray.sae.encoder import InputNorm, LatentEncoder, normalise, scale_of


class FrozenSae(nn.Module):
    """Encodes activations and writes changes of latents back, differentiable in the activations.

    Only what is needed is kept: the chosen latents' decoder rows, and the encoder where latents
    are read. Buffers and not parameters, because DeepSpeed's ZeRO-3 would cut parameters up and
    gather them in every forward; not persistent, because PEFT saves whatever state lies in a layer
    of its own, and a SAE is hundreds of megabytes.
    """

    W_dec: Float[Tensor, "chosen d_in"]
    norms: Float[Tensor, " chosen"]
    """Lengths of the decoder rows."""
    centre: Float[Tensor, " d_in"]
    W: Float[Tensor, "d_in d_sae"]
    shift: Float[Tensor, " d_sae"]
    theta: Float[Tensor, " d_sae"]
    chosen: Tensor | None

    def __init__(
        self,
        encoder: LatentEncoder,
        latents: Sequence[int] | None,
        *,
        reads: bool,
        identity: tuple[object, ...] = (),
    ) -> None:
        """Keep what is needed of a SAE.

        Args:
            encoder: of the SAE, in fp32.
            latents: that may change; None for all of them.
            reads: whether latents are encoded, or only written.
            identity: whose weights these are, and which of them.

        Raises:
            ModelError: it is a transcoder, or has no such latent.
        """
        super().__init__()
        self.identity = identity
        if encoder.is_transcoder:
            raise ModelError("a transcoder writes elsewhere than it reads: give a SAE")
        chosen = None if latents is None else torch.as_tensor(latents, dtype=torch.long)
        if chosen is not None and not (0 <= int(chosen.min()) <= int(chosen.max()) < encoder.d_sae):
            raise ModelError(
                f"latents {int(chosen.min())} to {int(chosen.max())} are asked for, and the SAE "
                f"has 0 to {encoder.d_sae - 1}: give some of these"
            )
        self.input_norm: InputNorm = encoder.input_norm
        self.k = encoder.k
        W_dec = encoder.W_dec if chosen is None else encoder.W_dec[chosen]
        self._keep("W_dec", W_dec)
        self._keep("norms", W_dec.norm(dim=-1))
        if not reads:
            return
        # Latents that compete with each other cannot be read one without the others.
        alone = chosen is None or encoder.k is not None
        part = slice(None) if alone else chosen
        self._keep("W", encoder.W[:, part])
        self._keep("shift", encoder.shift[part])
        self._keep("theta", encoder.theta[part])
        self._keep("centre", encoder.centre)
        self.register_buffer("chosen", chosen if alone else None, persistent=False)

    def _keep(self, name: str, tensor: Tensor) -> None:
        self.register_buffer(name, tensor.detach().float().contiguous(), persistent=False)

    def _apply(self, fn, recurse=True):
        # To another device with the model, but not to another precision: thresholds are exact.
        return super()._apply(lambda one: one.to(fn(one.new_empty(0)).device), recurse)

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch chosen"]:
        """Return the latents that may change, as `LatentEncoder.encode` does."""
        flat = normalise(x.reshape(-1, x.shape[-1]).float(), self.input_norm) - self.centre
        u = torch.addmm(self.shift, flat, self.W)
        if self.k is None:
            z = torch.where(u > 0, u + self.theta, 0.0)
        else:
            values, where = u.topk(min(self.k, u.shape[-1]), dim=-1, sorted=False)
            z = torch.zeros_like(u).scatter(-1, where, values.relu())
            z = z if self.chosen is None else z[:, self.chosen]
        return z.reshape(*x.shape[:-1], z.shape[-1])

    def scale(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch 1"] | None:
        """Return what one unit that is written is worth beside `x`; None where it is one."""
        return scale_of(x.float(), self.input_norm)
