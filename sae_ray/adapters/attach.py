"""Adapters put on a model: one description for every kind, and what comes back is PEFT's."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, get_args

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from pydantic import BaseModel, ConfigDict, model_validator
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sae_ray.adapters.edits import LATENT_KINDS, LatentEdit
from sae_ray.adapters.factors import Leaning
from sae_ray.adapters.latent import LatentConfig
from sae_ray.adapters.positions import Where
from sae_ray.adapters.subspace import Mode, Side, Subspace, hold, lora_config, place_subspace
from sae_ray.errors import ConfigError, ModelError
from sae_ray.sae.labels import fingerprint
from sae_ray.sae.pretrained import load_encoder

Kind = Literal["lora", "subspace", "steering", "scale", "affine", "residual"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_SETTINGS: dict[str, set[str]] = {
    "lora": {"r", "alpha", "targets", "layers"},
    "subspace": {"subspaces", "mode", "sides", "scale", "soft_weight"},
    **{
        kind: {"sae", "hook_points", "latents", "positions", "l1", "edit_penalty"}
        for kind in LATENT_KINDS
    },
}
_SETTINGS["residual"] |= {"hidden"}
_REQUIRED = {"subspace": "subspaces", **dict.fromkeys(LATENT_KINDS, "sae")}


class AdapterSpec(BaseModel):
    """What to train on a frozen model."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    kind: Kind
    r: int = 16
    """Rank, for lora."""
    alpha: float | None = None
    """Scale times rank, for lora; the rank unless given."""
    targets: tuple[str, ...] | None = None
    """Names of the matrices that lora changes; all linear ones but the head unless given."""
    layers: tuple[int, ...] | None = None
    """Numbers of the layers that lora changes; all unless given."""
    subspaces: tuple[str, ...] = ()
    """Folders of subspaces, as `Subspace.save` writes them."""
    scale: float = 1.0
    """What the product of a subspace's factors is multiplied by."""
    mode: Mode = "freeze"
    """What a subspace keeps: see `sae_ray.adapters.subspace`."""
    sides: tuple[Side, ...] = ("writers", "readers")
    """The matrices that a subspace is put on."""
    soft_weight: float = 1.0
    """Weight in the loss of the update's squared part outside the span, for mode soft."""
    sae: tuple[str, ...] = ()
    """SAEs whose latents are trained on: folders or release:sae_id."""
    hook_points: tuple[str, ...] = ()
    """Where each of them reads; its own unless given."""
    latents: tuple[int, ...] | None = None
    """Latents that may change, for a single SAE; all unless given."""
    positions: Where = "all"
    """Tokens at which latents change: all, all but the first of a sequence, or the answer's."""
    hidden: int = 16
    """Units of residual."""
    l1: float = 0.0
    """Weight in the loss of the sum of |parameter| x length of its decoder row."""
    edit_penalty: float = 0.0
    """Weight in the loss of the squared length of the change over that of what it changes."""

    @model_validator(mode="after")
    def _settings_fit_the_kind(self) -> "AdapterSpec":
        allowed = _SETTINGS[self.kind]
        if alien := sorted(self.model_fields_set - allowed - {"kind"}):
            raise ConfigError(
                f"adapter {self.kind} takes {', '.join(sorted(allowed))}, and not "
                f"{', '.join(alien)}: leave that out, or choose another kind"
            )
        needed = _REQUIRED.get(self.kind)
        if needed and not getattr(self, needed):
            raise ConfigError(f"adapter {self.kind} needs {needed}: give it")
        if min(self.r, self.hidden) < 1 or min(self.l1, self.edit_penalty, self.soft_weight) < 0:
            raise ConfigError(
                f"r={self.r}, hidden={self.hidden}, l1={self.l1}, edit_penalty="
                f"{self.edit_penalty}, soft_weight={self.soft_weight}: the first two are at least "
                "1, the others at least 0"
            )
        if self.hook_points and len(self.hook_points) != len(self.sae):
            raise ConfigError(
                f"{len(self.hook_points)} hook points and {len(self.sae)} SAEs: give each its own"
            )
        if self.latents is not None and (len(self.sae) != 1 or not self.latents):
            raise ConfigError("latents are numbers of one SAE's: give at least one, and one SAE")
        return self


def attach(
    model: PreTrainedModel | PeftModel, spec: AdapterSpec, *, name: str = "default"
) -> PeftModel:
    """Put a new adapter on a model; it changes no bit of what the model says until it is trained.

    A model that has adapters already is given another of the same method, not yet active.

    Raises:
        ModelError: model, SAE and hook points do not fit each other.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(base, PreTrainedModel)
    subspaces = [Subspace.load(folder) for folder in spec.subspaces]
    if subspaces:
        config = lora_config(base, subspaces, spec.sides, spec.scale)
    else:
        config = config_of(spec)
        _fit(config, base, spec)
    if isinstance(model, PeftModel):
        model.add_adapter(name, config)
    else:
        model = get_peft_model(model, config, adapter_name=name)
        assert isinstance(model, PeftModel)
    for subspace in subspaces:
        place_subspace(
            model, subspace, spec.mode, spec.sides, name=name, soft_weight=spec.soft_weight
        )
    return model


def _fit(config: PeftConfig, base: PreTrainedModel, spec: AdapterSpec) -> None:
    """Name the matrices that lora changes, in which layers, as PEFT wants it of this model."""
    if not isinstance(config, LoraConfig):
        return
    linear = require_matrices(base, spec.targets, spec.layers)
    config.fan_in_fan_out = any(isinstance(one, Conv1D) for one in linear.values())  # GPT-2's
    if spec.layers is not None:
        # PEFT takes no `all-linear` where layers are given.
        config.target_modules = sorted(spec.targets or linear)
        config.layers_to_transform = list(spec.layers)


def require_matrices(
    base: PreTrainedModel, targets: Sequence[str] | None, layers: Sequence[int] | None
) -> dict[str, nn.Linear | Conv1D]:
    """Return the matrices that lora may change, by name: all linear ones but the head.

    Raises:
        ModelError: the model lacks a layer, or a matrix of that name.
    """
    head = base.get_output_embeddings()
    linear = {
        path.rpartition(".")[2]: module
        for path, module in base.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }
    if unknown := sorted(set(targets or ()) - set(linear)):
        raise ModelError(
            f"targets={unknown[0]} and the model has {', '.join(sorted(linear))}: give some of "
            "these"
        )
    num_layers = base.config.get_text_config().num_hidden_layers
    if beyond := [one for one in layers or () if not 0 <= one < num_layers]:
        raise ModelError(
            f"layers={beyond[0]} and the model has layers 0 to {num_layers - 1}: give some of these"
        )
    return linear


def hold_again(adapted: PeftModel, spec: AdapterSpec, *, name: str = "default") -> None:
    """Freeze again what a loaded adapter of kind subspace keeps: PEFT's files do not say it."""
    for folder in spec.subspaces:
        subspace = Subspace.load(folder)
        hold(adapted, subspace, spec.mode, spec.sides, name=name, soft_weight=spec.soft_weight)


def share_penalties(adapted: PeftModel, backward_passes: int) -> None:
    """Tell what adds penalties how many backward passes one step of the optimiser sums over.

    They are gradients, added in each pass, and not scaled with the loss as it is for gradient
    accumulation.
    """
    for module in adapted.modules():
        for one in (module, getattr(module, "leaning", None)):
            if isinstance(one, LatentEdit | Leaning):
                one.backward_passes = backward_passes


@contextmanager
def unpenalised(adapted: PeftModel) -> Iterator[None]:
    """Leave out the penalties of latent edits in the forwards within."""
    edits = [module for module in adapted.modules() if isinstance(module, LatentEdit)]
    for edit in edits:
        edit.is_penalised = False
    try:
        yield
    finally:
        for edit in edits:
            edit.is_penalised = True


def config_of(spec: AdapterSpec) -> PeftConfig:
    """Return PEFT's description of a LoRA or of a latent adapter."""
    if spec.kind == "lora":
        return LoraConfig(
            r=spec.r,
            lora_alpha=spec.r if spec.alpha is None else spec.alpha,  # pyright: ignore
            target_modules="all-linear" if spec.targets is None else list(spec.targets),
            task_type="CAUSAL_LM",
        )
    assert spec.kind != "subspace", "that has a configuration of its own"
    points = spec.hook_points or tuple(str(load_encoder(sae).hook_point) for sae in spec.sae)
    sites = [
        {
            "hook_point": point,
            "sae": sae,
            "fingerprint": fingerprint(sae),
            "latents": None if spec.latents is None else list(spec.latents),
        }
        for point, sae in zip(points, spec.sae, strict=True)
    ]
    return LatentConfig(
        task_type="CAUSAL_LM",
        kind=spec.kind,
        sites=sites,
        positions=spec.positions,
        hidden=spec.hidden if spec.kind == "residual" else 0,
        l1=spec.l1,
        edit_penalty=spec.edit_penalty,
    )
