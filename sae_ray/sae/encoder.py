"""LatentEncoder: the fast inference path over sae-lens weights.

Every architecture that sae-lens encodes with one matrix product is one of two forms,

    pre = norm(x) @ W + b
    z   = pre where pre > theta else 0          (standard, jumprelu, gated, transcoders; theta >= 0)
    z   = relu(pre) on its k largest, else 0    (topk)

with b_dec, decoder norms and gates folded into W, b and theta. The thresholded form is computed
with theta folded in as well, u = relu(pre - theta): then sums and maxima of z follow from those of
u and from counts, in one matrix product and four passes over its result. The product is of
norm(x) - b_dec whatever the SAE was trained with (b makes up for it), because bf16 has three
digits, and a mean as long as the rest would use them up.

What is not a number stays so: latents and sums of a token with NaN in it are NaN.
Source: sae-lens 6.54, `saes/*_sae.py`, whose `encode` the tests compare with.
"""

import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int, Int64
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sae_ray.errors import ModelError
from sae_ray.lm import HookPoint

logger = logging.getLogger(__name__)

InputNorm = Literal["none", "layer_norm", "constant_norm_rescale"]
_FOLDED_NORMS = ("expected_average_only_in", "covariance_whitening")
"""Kinds that sae-lens folds into the weights when it saves a SAE for inference."""

_THRESHOLDED = {
    "standard": (),
    "jumprelu": ("threshold",),
    "gated": ("b_gate", "r_mag", "b_mag"),
    "transcoder": (),
    "skip_transcoder": (),
    "jumprelu_transcoder": ("threshold",),
    "jumprelu_skip_transcoder": ("threshold",),
}
_ARCHITECTURES = (*_THRESHOLDED, "topk")
_LAYER_NORM_EPS = 1e-5
_BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


@dataclasses.dataclass(frozen=True)
class Pooled:
    """What a run of tokens leaves of its latents."""

    sums: Float[Tensor, "segments d_sae"]
    maxes: Float[Tensor, "segments d_sae"]
    counts: Int[Tensor, "segments d_sae"]


@dataclasses.dataclass
class LatentEncoder:
    """A SAE's encoder, folded into one matrix, a bias and a threshold; and its decoder rows."""

    W: Float[Tensor, "d_in d_sae"]
    b: Float[Tensor, " d_sae"]
    theta: Float[Tensor, " d_sae"]
    k: int | None
    """Latents kept per token, for topk."""
    input_norm: InputNorm
    W_dec: Float[Tensor, "d_sae d_out"]
    b_dec: Float[Tensor, " d_out"]
    hook_point: HookPoint
    model_name: str | None
    """The model it was trained on, as its config says."""
    is_transcoder: bool = False
    """It writes to another place than it reads: nothing here can be reconstructed."""

    def __post_init__(self) -> None:
        centre = torch.zeros_like(self.W[:, 0]) if self.is_transcoder else self.b_dec
        self.centre = centre.to(self.W.dtype)
        # theta is subtracted before rounding, so that bf16 is finest where latents switch on.
        shift = self.b + _times(self.centre, self.W)
        shift = shift if self.k is not None else shift - self.theta
        self.shift = shift.to(self.W.dtype)

    @classmethod
    def load(cls, path: str | Path) -> "LatentEncoder":
        """Read `cfg.json` and `sae_weights.safetensors` of a sae-lens folder.

        Raises:
            ModelError: a file or weight is missing, has the wrong shape, or the architecture has
                no such form.
        """
        folder = Path(path)
        config, weights = _read_folder(folder)
        architecture = _architecture(folder, config)
        _check_weights(folder, architecture, config, weights)
        W, b, theta = _fold(architecture, config, weights)
        W_dec = weights["W_dec"].float()
        if _rescales(architecture, config):
            W_dec = torch.nn.functional.normalize(W_dec, dim=-1)
        metadata = config.get("metadata") or config  # flat, in older files
        return cls(
            W=W,
            b=b,
            theta=theta,
            k=config["k"] if architecture == "topk" else None,
            input_norm=_input_norm(folder, config),
            W_dec=W_dec,
            b_dec=weights["b_dec"].float(),
            hook_point=_hook_point(folder, metadata),
            model_name=metadata.get("model_name"),
            is_transcoder=_is_transcoder(architecture),
        )

    @property
    def d_in(self) -> int:
        """Width read."""
        return self.W.shape[0]

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.W.shape[1]

    def to(self, *, dtype: torch.dtype, device: str | torch.device = "cpu") -> "LatentEncoder":
        """Return a copy whose matrix product runs in `dtype`; thresholds stay fp32."""
        W = self.W.to(device, dtype)
        centre = self.centre.to(device, dtype)
        return dataclasses.replace(
            self,
            W=W,
            # Rounding W is to act on what differs from the centre, not on the centre itself.
            b=self.b.to(device) + _times(centre, self.W.to(device)) - _times(centre, W),
            theta=self.theta.to(device),
            W_dec=self.W_dec.to(device),
            b_dec=self.b_dec.to(device),
        )

    def encode(
        self, x: Float[Tensor, "*batch d_in"], latents: Sequence[int] | np.ndarray | None = None
    ) -> Float[Tensor, "*batch chosen"]:
        """Return latents, or those chosen, fp32."""
        columns = None if latents is None else torch.as_tensor(latents, device=self.W.device)
        if columns is not None and self.k is None:
            # Without competition between latents, the others need not be computed.
            return dataclasses.replace(
                self,
                W=self.W[:, columns],
                b=self.b[columns],
                theta=self.theta[columns],
                W_dec=self.W_dec[columns],
            ).encode(x)
        u = self._shifted(x.reshape(-1, self.d_in), None).float()
        z = torch.where(u == 0, u, u + self.theta) if self.k is None else u
        z = z if columns is None else z[:, columns]
        return z.reshape(*x.shape[:-1], z.shape[-1])

    def reconstruct(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        """Return what is left of `x` when it is encoded and decoded, fp32."""
        return self.decode(self.encode(x), x)

    def decode(
        self, latents: Float[Tensor, "*batch d_sae"], x: Float[Tensor, "*batch d_in"]
    ) -> Float[Tensor, "*batch d_in"]:
        """Return what latents stand for, in the scale of the `x` that they were read from."""
        assert not self.is_transcoder, "a transcoder writes elsewhere than it reads"
        x, x_hat = x.float(), latents @ self.W_dec + self.b_dec
        if (scale := scale_of(x, self.input_norm)) is not None:
            x_hat = x_hat * scale
        return x_hat + x.mean(-1, keepdim=True) if self.input_norm == "layer_norm" else x_hat

    def pool(
        self,
        x: Float[Tensor, "tokens d_in"],
        lengths: Int64[np.ndarray, " segments"],
        *,
        chunk_tokens: int = 1024,
    ) -> Pooled:
        """Sum, maximum and count of every latent over consecutive runs of tokens.

        Never holds more than `chunk_tokens` x d_sae latents, whatever the length of a run.
        """
        assert chunk_tokens < 2**15, "counts of one chunk must fit the smallest integer type"
        assert lengths.sum() == len(x), "every token belongs to one run"
        num = len(lengths)
        sums = torch.zeros(num, self.d_sae, device=x.device)
        maxes = torch.zeros(num, self.d_sae, device=x.device)
        counts = torch.zeros(num, self.d_sae, dtype=torch.int32, device=x.device)
        room = min(chunk_tokens, len(x))
        u_room = torch.empty(room, self.d_sae, dtype=self.W.dtype, device=x.device)
        bits_type = _BITS[self.W.dtype]
        on_room = torch.empty(room, self.d_sae, dtype=bits_type, device=x.device)
        for start, pieces in _chunks(lengths.tolist(), room):
            size = sum(length for _, length in pieces)
            u = self._shifted(x[start : start + size], u_room[:size])
            # Floats >= 0 are ordered as their bits are: integer passes cost half of the float
            # ones. The lower bound is for -0.0, whose bits are the smallest integer.
            bits = u.view(bits_type)
            on = torch.clamp(bits, 0, 1, out=on_room[:size])
            at = 0
            for segment, length in pieces:
                rows = slice(at, at + length)
                sums[segment] += u[rows].sum(0, dtype=torch.float32)
                largest = bits[rows].amax(0).view(self.W.dtype).float()
                torch.maximum(maxes[segment], largest, out=maxes[segment])
                counts[segment] += on[rows].sum(0, dtype=bits_type)
                at += length
        if self.k is None:
            sums += counts * self.theta
            maxes += (counts > 0) * self.theta
        return Pooled(sums, maxes, counts)

    def _shifted(
        self, x: Float[Tensor, "tokens d_in"], out: Float[Tensor, "tokens d_sae"] | None
    ) -> Float[Tensor, "tokens d_sae"]:
        """Return relu(pre - theta), or for topk the latents themselves."""
        x = (normalise(x, self.input_norm) - self.centre).to(self.W.dtype)
        u = torch.addmm(self.shift, x, self.W, out=out)
        if self.k is None:
            return u.relu_()
        values, where = u.topk(min(self.k, self.d_sae), dim=-1, sorted=False)
        return u.zero_().scatter_(-1, where, values.relu_())


def normalise(
    x: Float[Tensor, "*batch d_in"], input_norm: InputNorm
) -> Float[Tensor, "*batch d_in"]:
    """Return activations as the SAE's matrix is to see them."""
    match input_norm:
        case "none":
            return x
        case "constant_norm_rescale":
            x = x.float()
            return x * (x.shape[-1] ** 0.5 / x.norm(dim=-1, keepdim=True))
        case "layer_norm":
            x = x.float()
            x = x - x.mean(dim=-1, keepdim=True)
            return x / (x.std(dim=-1, keepdim=True) + _LAYER_NORM_EPS)


def scale_of(
    x: Float[Tensor, "*batch d_in"], input_norm: InputNorm
) -> Float[Tensor, "*batch 1"] | None:
    """Return what one unit that the decoder writes is worth beside `x`; None where it is one."""
    match input_norm:
        case "none":
            return None
        case "constant_norm_rescale":
            return x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
        case "layer_norm":
            return x.std(dim=-1, keepdim=True)


def _chunks(lengths: list[int], room: int) -> list[tuple[int, list[tuple[int, int]]]]:
    """Cut runs of tokens into chunks of at most `room`: (start, [(segment, length), ...])."""
    chunks: list[tuple[int, list[tuple[int, int]]]] = []
    start, pieces, used = 0, [], 0
    for segment, length in enumerate(lengths):
        while length > 0:
            # A short run goes to the next chunk whole rather than being cut in two.
            if pieces and used + length > room and (length <= room or used == room):
                chunks.append((start, pieces))
                start, pieces, used = start + used, [], 0
            take = min(length, room - used)
            pieces.append((segment, take))
            used += take
            length -= take
    return [*chunks, (start, pieces)] if pieces else chunks


def _read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config_path, weights_path = folder / "cfg.json", folder / "sae_weights.safetensors"
    for path in (config_path, weights_path):
        if not path.is_file():
            raise ModelError(
                f"SAE {folder}: {path.name} is missing; give a folder that holds cfg.json and "
                "sae_weights.safetensors, or release:sae_id of a published SAE"
            )
    try:
        config, weights = json.loads(config_path.read_text()), load_file(weights_path)
        if not isinstance(config, dict):
            raise ValueError("cfg.json holds no object")
    except (ValueError, SafetensorError) as error:
        raise ModelError(
            f"SAE {folder} cannot be read: {error}; copy or download the folder again"
        ) from error
    return config, weights


def _architecture(folder: Path, config: dict[str, Any]) -> str:
    architecture = config.get("architecture", "standard")
    if architecture not in _ARCHITECTURES:
        raise ModelError(
            f"SAE {folder}: architecture {architecture!r} is not supported for reading; "
            f"allowed are {', '.join(_ARCHITECTURES)} (save batchtopk and matryoshka SAEs as "
            "sae-lens does, for inference: that makes them jumprelu)"
        )
    return architecture


def _hook_point(folder: Path, metadata: dict[str, Any]) -> HookPoint:
    if not (name := metadata.get("hook_name")):
        raise ModelError(
            f"SAE {folder}: cfg.json does not say which hook point it reads; set metadata."
            "hook_name to, for example, blocks.12.hook_resid_post"
        )
    return HookPoint.parse(name)


def _input_norm(folder: Path, config: dict[str, Any]) -> InputNorm:
    norm = config.get("normalize_activations", "none")
    if norm in _FOLDED_NORMS:
        logger.warning(
            "SAE %s was trained on activations normalised by %r, and its weights were saved "
            "without it: they are read as they are, as sae-lens does; save it for inference again",
            folder,
            norm,
        )
        return "none"
    if norm not in get_args(InputNorm):
        raise ModelError(
            f"SAE {folder}: normalize_activations {norm!r} is not known; allowed are "
            f"{', '.join((*get_args(InputNorm), *_FOLDED_NORMS))}; save the SAE again with sae-lens"
        )
    return norm


def _check_weights(
    folder: Path, architecture: str, config: dict[str, Any], weights: dict[str, Tensor]
) -> None:
    needed = ["d_in", "d_sae"]
    needed += ["k"] if architecture == "topk" else []
    needed += ["d_out"] if _is_transcoder(architecture) else []
    if missing := [key for key in needed if not isinstance(config.get(key), int)]:
        raise ModelError(f"SAE {folder}: cfg.json has no {', '.join(missing)}; save it again")
    d_in, d_sae = config["d_in"], config["d_sae"]
    d_out = config["d_out"] if _is_transcoder(architecture) else d_in
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (d_in, d_sae)}
    if architecture != "gated":
        shapes["b_enc"] = (d_sae,)
    shapes |= {"W_dec": (d_sae, d_out), "b_dec": (d_out,)}
    shapes |= dict.fromkeys(_THRESHOLDED.get(architecture, ()), (d_sae,))
    for name, shape in shapes.items():
        if name not in weights:
            raise ModelError(
                f"SAE {folder}: weight {name} is missing from sae_weights.safetensors (there are "
                f"{', '.join(sorted(weights))}); copy or download the folder again"
            )
        if tuple(weights[name].shape) != shape:
            raise ModelError(
                f"SAE {folder}: {name} has shape {list(weights[name].shape)}, but cfg.json says "
                f"d_in={d_in}, d_sae={d_sae}, hence {list(shape)}: the two files do not belong "
                "together; copy or download the folder again"
            )


def _fold(
    architecture: str, config: dict[str, Any], raw: dict[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Fold biases, gates and norms into (W, b, theta); b in double precision, for it may cancel."""
    W = raw["W_enc"].float()
    weights = {name: tensor.double() for name, tensor in raw.items() if tensor.ndim == 1}
    offset = torch.zeros(W.shape[1], dtype=torch.float64)
    if config.get("apply_b_dec_to_input", True) and not _is_transcoder(architecture):
        offset = -_times(raw["b_dec"], W)
    theta = torch.zeros_like(offset)
    if architecture == "gated":
        # gate = s + b_gate > 0 and magnitude = s * e^r + b_mag > 0, both of s = x @ W: a threshold
        # on the magnitude.
        scale = weights["r_mag"].exp()
        b = offset * scale + weights["b_mag"]
        theta = (weights["b_mag"] - weights["b_gate"] * scale).clamp_min(0)
        W = (W * scale).float()
    else:
        b = offset + weights["b_enc"]
    if "threshold" in weights:
        theta = weights["threshold"].clamp_min(0)
    if _rescales(architecture, config):
        norm = raw["W_dec"].float().norm(dim=-1)
        W, b = W * norm, b * norm
    return W, b, theta.float()


def _times(vector: Float[Tensor, " d_in"], W: Float[Tensor, "d_in d_sae"]) -> Tensor:
    """Return vector @ W in double precision, without a copy of all of W."""
    return torch.cat([vector.double() @ part.double() for part in W.split(4096, dim=1)])


def _rescales(architecture: str, config: dict[str, Any]) -> bool:
    return architecture == "topk" and config.get("rescale_acts_by_decoder_norm", False)


def _is_transcoder(architecture: str) -> bool:
    return "transcoder" in architecture
