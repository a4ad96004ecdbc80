"""LatentEncoder: the fast inference path over sae-lens weights.

Every architecture that sae-lens encodes with one matrix product is one of two forms,

    pre = norm(x) @ W + b
    z   = pre where pre > theta else 0          (standard, jumprelu, gated, transcoders; theta >= 0)
    z   = relu(pre) on its k largest, else 0    (topk)

with b_dec, decoder norms and gates folded into W, b and theta. The thresholded form is computed
with theta folded in as well, u = relu(pre - theta): then sums and maxima of z follow from those of
u and from counts, in one matrix product and four passes over its result.
Source: sae-lens 6.54, `saes/*_sae.py`, whose `encode` the tests compare with.
"""

import dataclasses
import json
from pathlib import Path
from typing import Literal, Self

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sae_ray.errors import ModelError
from sae_ray.lm import HookPoint

InputNorm = Literal["none", "layer_norm", "constant_norm_rescale"]

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

    def __post_init__(self) -> None:
        # theta is subtracted before rounding, so that bf16 is finest where latents switch on.
        shift = self.b - self.theta if self.k is None else self.b
        self._W, self._shift = self.W, shift.to(self.W.dtype)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read `cfg.json` and `sae_weights.safetensors` of a sae-lens folder.

        Raises:
            ModelError: a file or weight is missing, has the wrong shape, or the architecture has
                no such form.
        """
        folder = Path(path)
        config, weights = _read_folder(folder)
        architecture = config.get("architecture", "standard")
        if architecture not in _ARCHITECTURES:
            raise ModelError(
                f"SAE {folder}: architecture {architecture!r} is not supported for reading; "
                f"allowed are {', '.join(_ARCHITECTURES)} (save batchtopk and matryoshka SAEs as "
                "sae-lens does, for inference: that makes them jumprelu)"
            )
        _check_weights(folder, architecture, config, weights)
        W, b, theta = _fold(architecture, config, weights)
        W_dec = weights["W_dec"].float()
        if _rescales(architecture, config):
            W_dec = W_dec / W_dec.norm(dim=-1, keepdim=True)
        name = config.get("metadata", {}).get("hook_name") or config.get("hook_name")
        if not name:
            raise ModelError(
                f"SAE {folder}: cfg.json does not say which hook point it reads; set metadata."
                "hook_name to, for example, blocks.12.hook_resid_post"
            )
        norm = config.get("normalize_activations", "none")
        return cls(
            W=W,
            b=b,
            theta=theta,
            k=config["k"] if architecture == "topk" else None,
            # sae-lens folds the other two kinds into the weights when it saves for inference.
            input_norm=norm if norm in ("layer_norm", "constant_norm_rescale") else "none",
            W_dec=W_dec,
            b_dec=weights["b_dec"].float(),
            hook_point=HookPoint.parse(name),
            model_name=config.get("metadata", {}).get("model_name") or config.get("model_name"),
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
        return dataclasses.replace(
            self,
            W=self.W.to(device, dtype),
            b=self.b.to(device),
            theta=self.theta.to(device),
            W_dec=self.W_dec.to(device),
            b_dec=self.b_dec.to(device),
        )

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Return latents, fp32."""
        flat = x.reshape(-1, self.d_in)
        u = self._shifted(flat, None).float()
        if self.k is None:
            z = torch.where(u > 0, u + self.theta, 0.0)
        else:
            z = u
        return z.reshape(*x.shape[:-1], self.d_sae)

    def reconstruct(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        """Return what is left of `x` when it is encoded and decoded, fp32."""
        x_hat = self.encode(x) @ self.W_dec + self.b_dec
        x = x.float()
        match self.input_norm:
            case "none":
                return x_hat
            case "constant_norm_rescale":
                return x_hat * (x.norm(dim=-1, keepdim=True) / self.d_in**0.5)
            case "layer_norm":
                mean = x.mean(dim=-1, keepdim=True)
                return x_hat * (x - mean).std(dim=-1, keepdim=True) + mean

    def pool(
        self,
        x: Float[Tensor, "tokens d_in"],
        lengths: Int[Tensor, " segments"],
        *,
        chunk_tokens: int = 1024,
    ) -> Pooled:
        """Sum, maximum and count of every latent over consecutive runs of tokens.

        Never holds more than `chunk_tokens` x d_sae latents, whatever the length of a run.
        """
        assert chunk_tokens < 2**15, "counts of one chunk must fit the smallest integer type"
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
        u = torch.addmm(self._shift, self._normalise(x).to(self.W.dtype), self._W, out=out)
        if self.k is None:
            return u.relu_()
        values, where = u.topk(min(self.k, self.d_sae), dim=-1, sorted=False)
        return u.zero_().scatter_(-1, where, values.relu_())

    def _normalise(self, x: Float[Tensor, "tokens d_in"]) -> Float[Tensor, "tokens d_in"]:
        match self.input_norm:
            case "none":
                return x
            case "constant_norm_rescale":
                x = x.float()
                return x * (self.d_in**0.5 / x.norm(dim=-1, keepdim=True))
            case "layer_norm":
                x = x.float()
                x = x - x.mean(dim=-1, keepdim=True)
                return x / (x.std(dim=-1, keepdim=True) + _LAYER_NORM_EPS)


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


def _read_folder(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    config_path, weights_path = folder / "cfg.json", folder / "sae_weights.safetensors"
    for path in (config_path, weights_path):
        if not path.is_file():
            raise ModelError(
                f"SAE {folder}: {path.name} is missing; give a folder that holds cfg.json and "
                "sae_weights.safetensors, or release:sae_id of a published SAE"
            )
    try:
        return json.loads(config_path.read_text()), load_file(weights_path)
    except (json.JSONDecodeError, SafetensorError) as error:
        raise ModelError(
            f"SAE {folder} cannot be read: {error}; copy or download the folder again"
        ) from error


def _check_weights(
    folder: Path, architecture: str, config: dict, weights: dict[str, Tensor]
) -> None:
    missing_config = [key for key in ("d_in", "d_sae") if key not in config]
    if architecture == "topk" and "k" not in config:
        missing_config.append("k")
    if missing_config:
        raise ModelError(f"SAE {folder}: cfg.json has no {', '.join(missing_config)}; save it again")
    d_in, d_sae = config["d_in"], config["d_sae"]
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (d_in, d_sae)}
    if architecture != "gated":
        shapes["b_enc"] = (d_sae,)
    if "transcoder" not in architecture:
        shapes |= {"W_dec": (d_sae, d_in), "b_dec": (d_in,)}
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
                f"d_in={d_in}, d_sae={d_sae}, hence {list(shape)}; the two files do not belong "
                "together"
            )


def _fold(architecture: str, config: dict, raw: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Fold biases, gates and norms into (W, b, theta) in double precision."""
    weights = {name: tensor.double() for name, tensor in raw.items()}
    W = weights["W_enc"]
    offset = torch.zeros_like(W[0])
    if config.get("apply_b_dec_to_input", True) and "b_dec" in weights:
        offset = -weights["b_dec"] @ W
    theta = torch.zeros_like(offset)
    if architecture == "gated":
        # gate = s + b_gate > 0 and magnitude = s * e^r + b_mag > 0, both of s = x @ W: a threshold
        # on the magnitude.
        scale = weights["r_mag"].exp()
        b = offset * scale + weights["b_mag"]
        theta = (weights["b_mag"] - weights["b_gate"] * scale).clamp_min(0)
        W = W * scale
    else:
        b = offset + weights["b_enc"]
    if "threshold" in weights:
        theta = weights["threshold"].clamp_min(0)
    if _rescales(architecture, config):
        norm = weights["W_dec"].norm(dim=-1)
        W, b = W * norm, b * norm
    return W.float(), b.float(), theta.float()


def _rescales(architecture: str, config: dict) -> bool:
    return architecture == "topk" and config.get("rescale_acts_by_decoder_norm", False)
