"""Language models cut off above a named hook point, and the activations there.

A hook point is named as in sae-lens (`blocks.12.hook_resid_post`) or by module path
(`model.layers.12`). Layers above the deepest one, the final norm and the head are not even loaded:
at layer 18 of a 28-layer model that saves over a third of the arithmetic. A causal model
right-padded in a batch gives every conversation just the activations that it has alone, so no
attention mask is passed.

This module knows neither conversations nor SAEs.
"""

import contextlib
import copy
import dataclasses
import functools
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from sae_ray import attention
from sae_ray.errors import ModelError
from sae_ray.hub import hub_arguments

Site = Literal["resid_pre", "resid_post", "mlp_out", "attn_out", "z"]

_SAE_LENS_NAMES: dict[str, Site] = {
    "hook_resid_pre": "resid_pre",
    "hook_resid_post": "resid_post",
    "hook_mlp_out": "mlp_out",
    "hook_attn_out": "attn_out",
    "attn.hook_z": "z",
}
_SAE_LENS = re.compile(r"^blocks\.(\d+)\.(.+)$")
_MODULE = re.compile(r"^(?:\w+\.)*?(?:layers|h)\.(\d+)$")


@dataclasses.dataclass(frozen=True, slots=True, order=True)
class HookPoint:
    """A place in the residual stack: a layer and a site in it."""

    layer: int
    site: Site

    @classmethod
    def parse(cls, name: str) -> "HookPoint":
        """Read a sae-lens name, or a layer's module path (which means its output)."""
        if (match := _SAE_LENS.match(name)) and match[2] in _SAE_LENS_NAMES:
            return cls(int(match[1]), _SAE_LENS_NAMES[match[2]])
        if match := _MODULE.match(name):
            return cls(int(match[1]), "resid_post")
        sites = "|".join(_SAE_LENS_NAMES)
        raise ModelError(
            f"hook point {name!r} is not known: give blocks.LAYER.({sites}) or the module path of "
            "a layer, such as model.layers.12"
        )

    @property
    def num_layers(self) -> int:
        """How many of the model's lowest layers it takes to get here."""
        return self.layer + (self.site != "resid_pre")

    def __str__(self) -> str:
        names = {site: name for name, site in _SAE_LENS_NAMES.items()}
        return f"blocks.{self.layer}.{names[self.site]}"


@dataclasses.dataclass(frozen=True, slots=True)
class Family:
    """Where a family of models keeps its layers, and a layer its sites (paths of modules)."""

    layers: str
    final_norm: str
    attn: str
    attn_out: str
    """Whose output is added to the stream: behind Gemma's post-norm."""
    out_proj: str
    """Whose input is z."""
    mlp_out: str


_LLAMA = Family("layers", "norm", "self_attn", "self_attn", "self_attn.o_proj", "mlp")
_GEMMA = dataclasses.replace(
    _LLAMA, attn_out="post_attention_layernorm", mlp_out="post_feedforward_layernorm"
)
FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "gpt_neox": Family(
        "layers", "final_layer_norm", "attention", "attention", "attention.dense", "mlp"
    ),
    "gpt2": Family("h", "ln_f", "attn", "attn", "attn.c_proj", "mlp"),
}
"""By `config.model_type`."""

DTypeName = Literal["float32", "bfloat16"]


def fast_dtype() -> DTypeName:
    """Return bfloat16 where this machine multiplies it fast: on a GPU or a CPU made for it."""
    cpu = torch.cpu.get_capabilities()
    native = any(cpu.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return "bfloat16" if native or torch.cuda.is_available() else "float32"


_TEXT_PART = {r"^(model\.)?language_model\.(model\.)?": ""}
"""Names of weights in models that also see: Gemma 3 from 4B on."""


class LanguageModel:
    """The lower part of a causal language model, read at hook points."""

    def __init__(self, model: PreTrainedModel, hook_points: Sequence[HookPoint]) -> None:
        self.model = model.eval().requires_grad_(False)
        self.hook_points = tuple(hook_points)
        self.family = family_of(model.config)

    @classmethod
    def load(
        cls,
        path: str | Path,
        hook_points: Sequence[HookPoint],
        *,
        dtype: DTypeName = "float32",
        device: str | torch.device = "cpu",
    ) -> "LanguageModel":
        """Load only what lies below the deepest hook point, from safetensors.

        Raises:
            ModelError: no such model, a family or hook point that is not there, or no safetensors.
        """
        config = load_config(path)
        family = family_of(config)
        for hook_point in hook_points:
            require_layer(hook_point, config, path)
        keep_layers(config, max(1, *(point.num_layers for point in hook_points)))
        try:
            with quiet_loading():
                model, info = AutoModel.from_pretrained(
                    **hub_arguments(path),
                    config=config,
                    dtype=getattr(torch, dtype),
                    use_safetensors=True,
                    trust_remote_code=False,
                    attn_implementation=_attention(config, dtype, torch.device(device)),
                    output_loading_info=True,
                    key_mapping=_TEXT_PART,
                    ignore_mismatched_sizes=True,  # so that they are counted, and refused below
                )
        except (OSError, ValueError, SafetensorError) as error:
            raise ModelError(
                f"cannot load the weights of {path}: {_first_line(error)}; weights are read from "
                "safetensors only (convert .bin files with save_pretrained)"
            ) from error
        mismatched = {key for key, *_ in info["mismatched_keys"]}
        wrong = sorted({*info["missing_keys"], *mismatched})
        if wrong := [name for name in wrong if not name.startswith(f"{family.final_norm}.")]:
            what = "has another shape" if wrong[0] in mismatched else "is missing"
            raise ModelError(
                f"{path} lacks {len(wrong)} of the weights that its config.json asks for: the "
                f"first, {wrong[0]}, {what}; copy or download the model again"
            )
        setattr(model, family.final_norm, nn.Identity())
        return cls(model.to(device), hook_points)

    def twin(self) -> "LanguageModel":
        """Return a second reader of the same weights: on a thread of its own each may be asked."""
        weights = (*self.model.parameters(), *self.model.buffers())
        shared: dict[int, object] = {id(weight): weight for weight in weights}
        return LanguageModel(copy.deepcopy(self.model, shared), self.hook_points)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.model.config.hidden_size

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    @torch.inference_mode()
    def read(self, ids: Int[Tensor, "batch seq"]) -> dict[HookPoint, Float[Tensor, "batch seq _"]]:
        """Run right-padded ids and return the activations at every hook point."""
        seen: dict[HookPoint, Tensor] = {}
        with contextlib.ExitStack() as stack:
            for point in self.hook_points:
                visit = functools.partial(seen.setdefault, point)
                stack.enter_context(visiting(self.model, self.family, point, visit))
            self.model(input_ids=ids, use_cache=False)
        return seen


@contextlib.contextmanager
def visiting(
    model: nn.Module, family: Family, point: HookPoint, visit: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    """Let `visit` see the activations at a hook point; the model goes on with what it returns."""
    layers = model.get_submodule(family.layers)
    assert isinstance(layers, nn.ModuleList)
    # What enters the first layer left out leaves the last one, into a norm without effect.
    place = family.final_norm if point.layer == len(layers) else ""
    layer = model.get_submodule(place or f"{family.layers}.{point.layer}")

    def visit_input(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (visit(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": visit(kwargs["hidden_states"])}

    def visit_output(_module: nn.Module, _args: object, output: Tensor | tuple) -> Tensor | tuple:
        return (visit(output[0]), *output[1:]) if isinstance(output, tuple) else visit(output)

    match point.site:
        case "resid_pre":
            handle = layer.register_forward_pre_hook(visit_input, with_kwargs=True)
        case "z":
            module = layer.get_submodule(family.out_proj)
            handle = module.register_forward_pre_hook(visit_input, with_kwargs=True)
        case "attn_out" | "mlp_out" as site:
            module = layer.get_submodule(getattr(family, site))
            handle = module.register_forward_hook(visit_output)
        case "resid_post":
            handle = layer.register_forward_hook(visit_output)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Keep transformers from reporting the layers that are left out on purpose."""
    level, bar = (
        transformers_logging.get_verbosity(),
        transformers_logging.is_progress_bar_enabled(),
    )
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with by_its_old_name():
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if bar:
            transformers_logging.enable_progress_bar()


@contextlib.contextmanager
def by_its_old_name() -> Iterator[None]:
    """TRL 1.16 and PEFT 0.21 speak of gradient checkpointing, which transformers has renamed."""
    with warnings.catch_warnings():
        message = r"`(is_)?gradient_checkpointing\w*` is deprecated"
        warnings.filterwarnings("ignore", message, FutureWarning)
        yield


def load_config(path: str | Path) -> PretrainedConfig:
    """Read a model's configuration: the text part, where there are several."""
    try:
        config = AutoConfig.from_pretrained(**hub_arguments(path), trust_remote_code=False)
        return config.get_text_config()
    except (OSError, ValueError) as error:
        raise ModelError(
            f"no language model at {path}: {_first_line(error)}; give a folder with config.json "
            "and model.safetensors, or a name on the Hugging Face hub"
        ) from error


def family_of(config: PretrainedConfig) -> Family:
    """Look up how a family lays out its modules."""
    if config.model_type not in FAMILIES:
        raise ModelError(
            f"models of type {config.model_type!r} are not supported: choose one of "
            f"{', '.join(FAMILIES)}, or add its module names to sae_ray.lm.FAMILIES"
        )
    return FAMILIES[config.model_type]


def keep_layers(config: PretrainedConfig, num_layers: int) -> None:
    """Cut a configuration down to its lowest layers, in place."""
    config.num_hidden_layers = num_layers
    # Families with sliding windows list a kind for every layer.
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:num_layers]


def weight_bytes(path: str | Path, hook_point: HookPoint, dtype: DTypeName) -> int:
    """Return what the weights below a hook point take in memory; none of them is loaded."""
    config = load_config(path)
    keep_layers(config, max(1, hook_point.num_layers))
    with torch.device("meta"):
        model = AutoModel.from_config(config, trust_remote_code=False)
    return getattr(torch, dtype).itemsize * sum(p.numel() for p in model.parameters())


def _attention(config: PretrainedConfig, dtype: DTypeName, device: torch.device) -> str:
    """Choose an attention: only the eager one can cap its logits, as Gemma 2 does."""
    if getattr(config, "attn_logit_softcapping", None):
        return "eager"
    return attention.register() if (device.type, dtype) == ("cpu", "bfloat16") else "sdpa"


def width_at(config: PretrainedConfig, hook_point: HookPoint) -> int:
    """Return the number of values that a hook point holds for each token."""
    if hook_point.site != "z":
        return config.hidden_size
    heads = config.num_attention_heads
    return heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)


def require_layer(hook_point: HookPoint, config: PretrainedConfig, path: str | Path) -> None:
    """Refuse a hook point above the model's last layer."""
    if not 0 <= hook_point.layer < config.num_hidden_layers:
        raise ModelError(
            f"hook point {hook_point}: {path} has layers 0 to {config.num_hidden_layers - 1}; name "
            "one of these, or give the model that the SAE was trained on"
        )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
