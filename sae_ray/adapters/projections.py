"""Projections: the matrices of a layer that write to the residual stream, or read it."""

import dataclasses

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from sae_ray.lm import family_of


@dataclasses.dataclass(frozen=True, slots=True)
class Projection:
    """A matrix between stream and layer, and the norm that lies between it and the stream."""

    path: str
    """In the layer."""
    norm: str | None
    """Before a reader, or behind a writer (Gemma's post-norms)."""


@dataclasses.dataclass(frozen=True, slots=True)
class Projections:
    """Writers and readers of a family's layers; of the writers, the MLP's is last."""

    writers: tuple[Projection, ...]
    readers: tuple[Projection, ...]


def _llama(mlp_norm: str, *post_norms: str) -> Projections:
    attn_post, mlp_post = post_norms or (None, None)
    reads = [f"self_attn.{name}_proj" for name in "qkv"]
    return Projections(
        writers=(
            Projection("self_attn.o_proj", attn_post),
            Projection("mlp.down_proj", mlp_post),
        ),
        readers=(
            *(Projection(path, "input_layernorm") for path in reads),
            *(Projection(f"mlp.{name}_proj", mlp_norm) for name in ("gate", "up")),
        ),
    )


_LLAMA = _llama("post_attention_layernorm")
_GEMMA = _llama(
    "pre_feedforward_layernorm", "post_attention_layernorm", "post_feedforward_layernorm"
)
PROJECTIONS: dict[str, Projections] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "gpt_neox": Projections(
        writers=(Projection("attention.dense", None), Projection("mlp.dense_4h_to_h", None)),
        readers=(
            Projection("attention.query_key_value", "input_layernorm"),
            Projection("mlp.dense_h_to_4h", "post_attention_layernorm"),
        ),
    ),
    "gpt2": Projections(
        writers=(Projection("attn.c_proj", None), Projection("mlp.c_proj", None)),
        readers=(Projection("attn.c_attn", "ln_1"), Projection("mlp.c_fc", "ln_2")),
    ),
}
"""By `config.model_type`, as `sae_ray.lm.FAMILIES`."""


def layers_path(model: PreTrainedModel) -> str:
    """Return the path of the list of layers in a whole model, such as `model.layers`."""
    decoder = model.get_decoder()
    (name,) = (name for name, module in model.named_modules() if module is decoder)
    family = family_of(model.config.get_text_config())
    return f"{name}.{family.layers}" if name else family.layers


def gain(norm: nn.Module) -> Float[Tensor, " d_model"]:
    """Return what a norm multiplies each coordinate by: Gemma keeps it less one."""
    weight = norm.weight
    assert isinstance(weight, Tensor)
    return weight.detach().float() + ("Gemma" in type(norm).__name__)


def gentle_inverse(gains: Float[Tensor, " d_model"]) -> Float[Tensor, " d_model"]:
    """Return 1 / gain, small gains taken for 5 % of the median, which keeps the inverse finite."""
    least = 0.05 * gains.abs().median()
    sign = torch.where(gains < 0, -1.0, 1.0)
    return sign / gains.abs().clamp_min(least)
