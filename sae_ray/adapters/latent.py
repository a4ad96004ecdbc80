"""ISaeRFT as a PEFT method: what is trained sits on the latents of a SAE inside a frozen model.

Importing this module makes the method known to PEFT; then `get_peft_model`, `PeftModel.
from_pretrained`, `add_adapter`, `set_adapter`, `disable_adapter` and `save_pretrained` are PEFT's
own. PEFT names a type that it does not know (`KeyError: 'SAE_RAY.ADAPTERS.LATENT'`), so the type is
called as the module to import.

The layer does not wrap the module that it edits but lies in it, and the module calls it by a hook
that is put on once and asks a flag: what the module is, what it is called, what it records as its
output and what is checkpointed stay as they are, and no second adapter is hidden from PEFT inside
a wrapper of the first.
Source: PEFT 0.21, `tuners/tuners_utils.py`; the rules are those of its `BaseTuner`.
"""

import contextlib
import dataclasses
import functools
import re
from collections.abc import Iterator, Sequence
from typing import Any

import peft
import torch
from jaxtyping import Float
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import register_peft_method
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from sae_ray.adapters.edits import LATENT_KINDS, LatentEdit, LatentKind
from sae_ray.adapters.frozen_sae import FrozenSae
from sae_ray.adapters.merging import Biases, bias_of
from sae_ray.adapters.positions import Positions, Where
from sae_ray.adapters.projections import layers_path
from sae_ray.errors import ModelError
from sae_ray.lm import HookPoint, family_of, require_layer
from sae_ray.sae.encoder import LatentEncoder
from sae_ray.sae.labels import fingerprint
from sae_ray.sae.pretrained import load_encoder

NAME = "sae_ray.adapters.latent"
_INPUT, _OUTPUT = "sae_in", "sae_out"
"""What a layer is called inside the module whose input or output it edits."""


def _member(name: str) -> peft.PeftType:
    """Add a member to PEFT's enumeration of methods, which knows no others than its own."""
    value = name.upper()
    member = str.__new__(peft.PeftType, value)
    member._name_ = member._value_ = value
    peft.PeftType._member_names_.append(value)
    peft.PeftType._member_map_[value] = member
    peft.PeftType._value2member_map_[value] = member
    type.__setattr__(peft.PeftType, value, member)
    return member


PEFT_TYPE = _member(NAME)


@dataclasses.dataclass
class LatentConfig(PeftConfig):
    """What is trained, and where; saved by PEFT as `adapter_config.json`."""

    kind: LatentKind = "steering"
    sites: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """For each hook point: hook_point, sae (folder or release:sae_id), fingerprint (SHA-256 of its
    weights), latents (a list, or null for all)."""
    positions: Where = "all"
    """Tokens that are edited: all, non_bos, completion."""
    hidden: int = 0
    """Units of a residual edit."""
    l1: float = 0.0
    edit_penalty: float = 0.0
    target_modules: str | None = None
    """Set when it is attached: a pattern of the modules that hold the hook points."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        if self.kind not in LATENT_KINDS:
            raise ModelError(f"kind={self.kind!r}: give one of {', '.join(LATENT_KINDS)}")


class LatentLayer(nn.Module, BaseTunerLayer):
    """The edits of all adapters at one hook point, by adapter."""

    adapter_layer_names = ("latent_edit",)
    handle: RemovableHandle
    """Of the hook by which the module calls it."""

    def __init__(self, point: HookPoint, positions: Positions, biases: Biases) -> None:
        super().__init__()
        # A dictionary of modules, not of parameters: keys must read `.default.`, as TRL looks for
        # that to copy a policy into its reference.
        self.latent_edit = nn.ModuleDict()
        self.point = point
        self.positions = positions
        self.biases = biases
        self.where: dict[str, Where] = {}
        """At which tokens each adapter acts."""
        self.rows: list[str] | None = None
        """The adapter of each row of the batch, where rows have different ones."""
        self.merged_adapters = []
        self._active_adapter = []

    def edit(self, name: str) -> LatentEdit:
        """Return one adapter's edit."""
        edit = self.latent_edit[name]
        assert isinstance(edit, LatentEdit)
        return edit

    def forward(self, x: Float[Tensor, "batch seq d_in"]) -> Float[Tensor, "batch seq d_in"]:
        """Return the activations as edited by the active adapters, each of which sees `x`."""
        names = self.active_adapters if self.rows is None else sorted(set(self.rows))
        names = [
            one for one in names if one in self.latent_edit and one not in self.merged_adapters
        ]
        if self.disable_adapters or not names:
            return x
        if self.rows is not None:
            return self._by_row(x, names, self.rows)
        masks = [self.positions.mask(self.where[name]) for name in names]
        changes = [self.latent_edit[name](x, mask) for name, mask in zip(names, masks, strict=True)]
        return x + functools.reduce(torch.add, changes).to(x.dtype)

    def _by_row(self, x: Tensor, names: Sequence[str], rows: Sequence[str]) -> Tensor:
        """Let each adapter see and change its own rows alone."""
        edited = x.clone()
        for name in names:
            mine = torch.tensor([i for i, row in enumerate(rows) if row == name], device=x.device)
            mask = self.positions.mask(self.where[name])
            own = x[mine]
            change = self.latent_edit[name](own, None if mask is None else mask[mine])
            edited[mine] = own + change.to(x.dtype)
        return edited

    def edit_output(self, _module: nn.Module, _args: object, output: Tensor | tuple) -> Any:
        """Edit what a module gives: a tensor, or the first of a tuple."""
        return (self(output[0]), *output[1:]) if isinstance(output, tuple) else self(output)

    def edit_input(self, _module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Edit what a module takes: its first argument, or `hidden_states`."""
        if args:
            return (self(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": self(kwargs["hidden_states"])}

    def mergeable(self, name: str, model: PreTrainedModel) -> tuple[nn.Parameter, Tensor]:
        """Return the bias that can take an adapter's edit, and what is to be added to it.

        Raises:
            ModelError: none can, and why.
        """
        edit = self.edit(name)
        if edit.kind != "steering" or edit.sae.input_norm != "none":
            what = edit.kind if edit.kind != "steering" else "steering with a normalising SAE"
            raise ModelError(
                f"adapter {name} ({what}) cannot be merged: it depends on what each token "
                "activates; use it as it is, or unload() for the model without it"
            )
        if self.where[name] != "all":
            raise ModelError(
                f"adapter {name} (positions={self.where[name]}) cannot be merged: a bias acts at "
                "every token; use it as it is, or unload() for the model without it"
            )
        with torch.no_grad():
            return bias_of(model, self.point, edit.constant())

    def merge_into(self, name: str, bias: nn.Parameter, change: Tensor) -> None:
        """Add an adapter's edit to a bias, and do without it from now on."""
        self.biases.add((id(self), name), bias, change)
        self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Take merged edits out of their biases, to the bit."""
        while self.merged_adapters:
            self.biases.remove((id(self), self.merged_adapters.pop()))

    def enable_adapters(self, enabled: bool) -> None:
        """Switch adapters on, or off, which takes merged ones out."""
        if not enabled:
            self.unmerge()
        super().enable_adapters(enabled)


class LatentModel(BaseTuner):
    """A model with latent layers in it, as PEFT has it."""

    prefix = "latent_"
    tuner_layer_cls = LatentLayer
    target_module_mapping: dict[str, list[str]] = {}

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        self.positions = Positions()
        self.biases = Biases()

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        assert isinstance(peft_config, LatentConfig)
        paths = [_path(self.model, point) for point in _points(peft_config, self.model)]
        peft_config.target_modules = "|".join(re.escape(path) for path in dict.fromkeys(paths))
        return peft_config

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        assert isinstance(peft_config, LatentConfig)
        points = _points(peft_config, self.model)
        for site, point in zip(peft_config.sites, points, strict=True):
            if _path(self.model, point) == current_key:
                layer = self._layer(target, point)
                edit = _edit(peft_config, site, point, layer)
                edit.requires_grad_(adapter_name in self.active_adapters)
                layer.latent_edit[adapter_name] = edit.to(_device(target, self.model))
                layer.where[adapter_name] = peft_config.positions
        if peft_config.positions != "all":
            self.positions.watch(self.model)

    def _layer(self, host: nn.Module, point: HookPoint) -> LatentLayer:
        """Return the layer in a module, put there with its hook if it is not yet."""
        before = point.site in ("resid_pre", "z")
        name = _INPUT if before else _OUTPUT
        if not hasattr(host, name):
            layer = LatentLayer(point, self.positions, self.biases)
            host.add_module(name, layer)
            # First of all hooks, so that others see what the model goes on with.
            layer.handle = (
                host.register_forward_pre_hook(layer.edit_input, with_kwargs=True, prepend=True)
                if before
                else host.register_forward_hook(layer.edit_output, prepend=True)
            )
        return getattr(host, name)

    def layers(self) -> list[tuple[nn.Module, str, LatentLayer]]:
        """Return every latent layer with the module that it lies in and its name there."""
        return [
            (host, name, layer)
            for host in self.model.modules()
            for name, layer in host.named_children()
            if isinstance(layer, LatentLayer)
        ]

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        """Add steering vectors to biases; refuse whatever that cannot be exact for.

        Raises:
            ModelError: no bias takes it, or the edit depends on the activations or the position.
        """
        names = self.active_adapters if adapter_names is None else adapter_names
        todo = [
            (layer, name, *layer.mergeable(name, self.model))
            for _, _, layer in self.layers()
            for name in names
            if name in layer.latent_edit and name not in layer.merged_adapters
        ]
        for layer, name, bias, change in todo:
            if safe_merge and not change.isfinite().all():
                raise ModelError(f"adapter {name} holds what is no number: train it again")
            layer.merge_into(name, bias, change)

    def unmerge_adapter(self) -> None:
        """Take every merged edit out again, to the bit."""
        for _, _, layer in self.layers():
            layer.unmerge()

    def _unload_and_optionally_merge(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self.merge_adapter(adapter_names, safe_merge)
        else:
            self.unmerge_adapter()
        for host, name, layer in self.layers():
            layer.handle.remove()
            delattr(host, name)
        self.positions.unwatch()
        del self.model.peft_config
        return self.model

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *_args: Any, **kwargs: Any) -> Iterator[None]:
        """Give rows of a batch an adapter each, as PEFT does for LoRA: `adapter_names=[...]`."""
        names: Sequence[str] | None = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        self._require_rows(names)
        layers = [layer for _, _, layer in self.layers()]
        num_beams = kwargs.get("num_beams") or 1
        for layer in layers:
            layer.rows = [name for name in names for _ in range(num_beams)]
        try:
            yield
        finally:
            for layer in layers:
                layer.rows = None

    def _require_rows(self, names: Sequence[str]) -> None:
        if self.training:
            raise ModelError("adapter_names is for inference: call eval() first")
        if any(layer.merged for _, _, layer in self.layers()):
            raise ModelError("adapter_names and a merged adapter: call unmerge_adapter() first")
        if unknown := sorted({*names} - {"__base__", *self.peft_config}):
            raise ModelError(
                f"adapter_names={', '.join(unknown)}: there are {', '.join(self.peft_config)}, and "
                "__base__ for none"
            )


def _device(host: nn.Module, model: nn.Module) -> torch.device:
    """Return where a module's weights are, or the model's first where it has none."""
    return next(host.parameters(), next(model.parameters())).device


def _points(config: LatentConfig, model: PreTrainedModel) -> list[HookPoint]:
    """Read an adapter's hook points, refusing two of the same activations."""
    points = [HookPoint.parse(site["hook_point"]) for site in config.sites]
    seen: dict[HookPoint, HookPoint] = {}
    for point in points:
        require_layer(point, model.config.get_text_config(), model.name_or_path or "the model")
        if (there := seen.setdefault(_reached(point), point)) is not point:
            raise ModelError(
                f"hook points {there} and {point} are the same activations: give one of them"
            )
    return points


def _reached(point: HookPoint) -> HookPoint:
    """Return one name for the same activations: what leaves a layer enters the next."""
    before = point.site == "resid_pre" and point.layer > 0
    return HookPoint(point.layer - 1, "resid_post") if before else point


def _path(model: PreTrainedModel, point: HookPoint) -> str:
    """Return the path of the module whose input or output a hook point is."""
    family = family_of(model.config.get_text_config())
    layer = f"{layers_path(model)}.{point.layer}"
    inside = {"attn_out": family.attn_out, "mlp_out": family.mlp_out, "z": family.out_proj}
    return f"{layer}.{inside[point.site]}" if point.site in inside else layer


def _edit(
    config: LatentConfig, site: dict[str, Any], point: HookPoint, layer: LatentLayer
) -> LatentEdit:
    """Make an edit that changes nothing, on the SAE that the site names, loaded if need be."""
    reads = config.kind != "steering"
    latents = site["latents"]
    identity = (site["fingerprint"], reads, None if latents is None else tuple(latents))
    saes = {layer.edit(name).sae.identity: layer.edit(name).sae for name in layer.latent_edit}
    if (sae := saes.get(identity)) is None:
        encoder = load_checked(site["sae"], site["fingerprint"], point)
        sae = FrozenSae(encoder, latents, reads=reads, identity=identity)
    return LatentEdit(
        config.kind, sae, hidden=config.hidden, l1=config.l1, edit_penalty=config.edit_penalty
    )


def load_checked(sae: str, sha256: str, point: HookPoint) -> LatentEncoder:
    """Load the SAE of a hook point, refusing another than the adapter was made on.

    Raises:
        ModelError: its weights are others, or it reads at another hook point.
    """
    if (found := fingerprint(sae)) != sha256:
        raise ModelError(
            f"the SAE at {sae} is not the one that the adapter was made on (SHA-256 {found[:12]}, "
            f"not {sha256[:12]}), and its latents are others: put the right one there, or name it "
            "under sites in adapter_config.json"
        )
    encoder = load_encoder(sae)
    if _reached(encoder.hook_point) != _reached(point):
        raise ModelError(
            f"the SAE at {sae} reads {encoder.hook_point} and is to be used at {point}: give one "
            "that was trained there"
        )
    return encoder


if PEFT_TYPE not in PEFT_TYPE_TO_TUNER_MAPPING:
    register_peft_method(
        name=NAME, config_cls=LatentConfig, model_cls=LatentModel, prefix="latent_"
    )
