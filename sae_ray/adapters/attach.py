"""Adapters put on a model: one description for every kind, and what comes back is PEFT's."""

from typing import Literal, get_args

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from pydantic import BaseModel, ConfigDict, model_validator
from transformers import PreTrainedModel

from sae_ray.adapters.edits import LATENT_KINDS
from sae_ray.adapters.latent import LatentConfig
from sae_ray.adapters.positions import Where
from sae_ray.errors import ConfigError
from sae_ray.sae.labels import fingerprint
from sae_ray.sae.pretrained import load_encoder

Kind = Literal["lora", "subspace", "steering", "scale", "affine", "residual"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_SETTINGS: dict[str, set[str]] = {
    "lora": {"r", "alpha", "targets"},
    "subspace": {"subspace", "mode", "sides", "alpha"},
    **{
        kind: {"sae", "hook_points", "latents", "positions", "l1", "edit_penalty"}
        for kind in LATENT_KINDS
    },
}
_SETTINGS["residual"] |= {"hidden"}
_REQUIRED = {"subspace": "subspace", **dict.fromkeys(LATENT_KINDS, "sae")}


class AdapterSpec(BaseModel):
    """What to train on a frozen model."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    kind: Kind
    r: int = 16
    """Rank, for lora."""
    alpha: float | None = None
    """Scale times rank, for lora and subspace; the rank unless given."""
    targets: tuple[str, ...] | None = None
    """Names of the matrices that lora changes; all linear ones but the head unless given."""
    subspace: str | None = None
    """Folder of a subspace, made by `sae_ray.adapters.subspace`."""
    mode: Literal["freeze", "init", "core", "soft"] = "freeze"
    """What a subspace keeps: see `sae_ray.adapters.subspace`."""
    sides: tuple[Literal["writers", "readers"], ...] = ("writers", "readers")
    """The matrices that a subspace is put on."""
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
    config = config_of(spec)
    if isinstance(model, PeftModel):
        model.add_adapter(name, config)
        return model
    adapted = get_peft_model(model, config, adapter_name=name)
    assert isinstance(adapted, PeftModel)
    return adapted


def config_of(spec: AdapterSpec) -> PeftConfig:
    """Return PEFT's description of an adapter."""
    if spec.kind == "lora":
        return LoraConfig(
            r=spec.r,
            lora_alpha=spec.r if spec.alpha is None else spec.alpha,
            target_modules="all-linear" if spec.targets is None else list(spec.targets),
            task_type="CAUSAL_LM",
        )
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
