"""Subspace: what chosen latents write, as a folder, and the LoRA that is confined to it.

Of a SAE of the residual stream behind layer l, with basis U:

    writers of layer l       lora_B = G⁻¹ U,     lora_A = 0    (o_proj, down_proj, ...)
    readers of layer l + 1   lora_A = Uᵀ G⁻¹,    lora_B = 0    (q, k, v, gate, up, ...)

G the gain of the norm between matrix and stream: before a reader, behind a writer (Gemma alone; the
norm's division by the length remains, so there the update stays in the span only nearly). What
trains:

    freeze   the other factor; the one from U stays as it is, to the bit
    init     both: U is where training begins, and no more (as in SAILS)
    core     an r x r matrix between U and the matching singular directions of the weight
    soft     both, with the part of the update outside the span in the loss

A new one changes no bit, and what is saved is a plain LoRA, which loads without this library.
Source: after SAILS, arXiv 2512.23260; which factor holds the basis, and all but `init`, is ours.
"""

import dataclasses
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from sae_ray.adapters.basis import DEFAULT, Basis, BasisRule, build_basis
from sae_ray.adapters.contrast import Contrast, Score
from sae_ray.adapters.factors import Core, factors, freeze_factor, lean_to
from sae_ray.adapters.projections import (
    PROJECTIONS,
    Projection,
    gain,
    gentle_inverse,
    layers_path,
)
from sae_ray.errors import ArtifactError, ModelError
from sae_ray.lm import HookPoint, family_of
from sae_ray.sae.labels import fingerprint
from sae_ray.sae.pretrained import load_encoder

Mode = Literal["freeze", "init", "core", "soft"]
Side = Literal["writers", "readers"]
_TENSORS, _FACTS = "subspace.safetensors", "subspace.json"
_BASIS_TENSORS = ("U", "S", "loadings", "latents")


@dataclasses.dataclass(frozen=True)
class Subspace:
    """The basis at one hook point, and where it comes from."""

    basis: Basis
    hook_point: HookPoint
    facts: dict
    """SAE and its fingerprint, scores, numbers of conversations, warnings: for people."""

    @classmethod
    def of(
        cls,
        sae: str,
        found: Contrast,
        rule: BasisRule = DEFAULT,
        *,
        score: Score = "t",
        k: int | None = None,
    ) -> "Subspace":
        """Choose latents by a contrast and make their basis.

        Raises:
            TaskError: no latent tells the sets apart, or the chosen ones give no such basis.
        """
        encoder = load_encoder(sae)
        chosen = found.select(k, score)
        scores = found.scores(score)[chosen]
        basis = build_basis(encoder.W_dec, torch.from_numpy(chosen), torch.from_numpy(scores), rule)
        facts = {
            "sae": sae,
            "fingerprint": fingerprint(sae),
            "hook_point": str(encoder.hook_point),
            "coherence": basis.coherence,
            "score": score,
            "rule": dataclasses.asdict(rule),
            "threshold": found.threshold,
            "num_positive": found.positive.num_rows,
            "num_against": found.against.num_rows,
            "latents": [
                {
                    "latent": int(latent),
                    "score": float(value),
                    "t": float(found.t[latent]),
                    "effect": float(found.effect[latent]),
                    "density_positive": float(found.positive.density[latent]),
                    "density_against": float(found.against.density[latent]),
                }
                for latent, value in zip(chosen, scores, strict=True)
            ],
            "warnings": list(found.warnings),
        }
        return cls(basis, encoder.hook_point, facts)

    def save(self, folder: str | Path) -> None:
        """Write `subspace.safetensors` and `subspace.json`."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        tensors = {name: getattr(self.basis, name).contiguous() for name in _BASIS_TENSORS}
        save_file(tensors, path / _TENSORS)
        (path / _FACTS).write_text(json.dumps(self.facts, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> "Subspace":
        """Read what `save` wrote.

        Raises:
            ArtifactError: it is not there, or damaged.
        """
        path = Path(folder)
        try:
            tensors = load_file(path / _TENSORS)
            facts = json.loads((path / _FACTS).read_text(encoding="utf-8"))
            basis = Basis(
                **{name: tensors[name] for name in _BASIS_TENSORS}, coherence=facts["coherence"]
            )
            return cls(basis, HookPoint.parse(facts["hook_point"]), facts)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError(
                f"no subspace at {path} ({error}): give a folder with {_TENSORS} and {_FACTS}, "
                "as Subspace.save writes it"
            ) from error


@dataclasses.dataclass(frozen=True)
class Place:
    """A matrix that a basis is put on."""

    path: str
    side: Side
    norm: str | None
    """Path of the norm between it and the stream."""


def places(model: PreTrainedModel, point: HookPoint, sides: tuple[Side, ...]) -> list[Place]:
    """Return the matrices that write what a hook point holds, and those that read it next.

    Raises:
        ModelError: there is none: the hook point is no part of the stream, or has nothing around.
    """
    config = model.config.get_text_config()
    family_of(config)  # refuses an unknown one
    stack = layers_path(model)
    projections = PROJECTIONS[config.model_type]
    layer = point.layer - (point.site == "resid_pre")
    attn, mlp = projections.writers
    writers = {
        "resid_pre": (attn, mlp),
        "resid_post": (attn, mlp),
        "attn_out": (attn,),
        "mlp_out": (mlp,),
    }.get(point.site, ())
    readers = projections.readers if point.site.startswith("resid") else ()
    found: list[Place] = []
    for side, at, chosen in (("writers", layer, writers), ("readers", layer + 1, readers)):
        if side in sides and 0 <= at < config.num_hidden_layers:
            found += [_place(f"{stack}.{at}", side, one) for one in chosen]
    if not found:
        raise ModelError(
            f"no {' or '.join(sides)} at {point}: a subspace is of the residual stream "
            "(resid_pre, resid_post) or of what is added to it (attn_out, mlp_out)"
        )
    return found


def _place(layer: str, side: Side, one: Projection) -> Place:
    return Place(f"{layer}.{one.path}", side, one.norm and f"{layer}.{one.norm}")


def lora_config(
    model: PreTrainedModel, subspaces: Sequence[Subspace], sides: tuple[Side, ...], scale: float
) -> LoraConfig:
    """Return the plain LoRA that subspaces are put into, each with its own rank.

    Raises:
        ModelError: two of them are of the same matrix.
    """
    ranks: dict[str, int] = {}
    for subspace in subspaces:
        for place in places(model, subspace.hook_point, sides):
            if place.path in ranks:
                raise ModelError(
                    f"two subspaces are put on {place.path}, {subspace.hook_point}'s is the "
                    "second: give one of them, or one side alone (writers, readers)"
                )
            ranks[place.path] = subspace.basis.r
    r = max(ranks.values())
    patterns = {f"^{re.escape(path)}": rank for path, rank in ranks.items() if rank != r}
    transposed = {not isinstance(model.get_submodule(path), nn.Linear) for path in ranks}
    return LoraConfig(
        r=r,
        lora_alpha=scale * r,  # pyright: ignore[reportArgumentType]
        rank_pattern=patterns,
        alpha_pattern={path: scale * rank for path, rank in patterns.items()},
        # Paths and not names: the same names are in every other layer.
        target_modules=list(ranks),
        fan_in_fan_out=transposed == {True},
        task_type="CAUSAL_LM",
    )


def place_subspace(
    adapted: PeftModel,
    subspace: Subspace,
    mode: Mode,
    sides: tuple[Side, ...],
    *,
    name: str = "default",
    soft_weight: float = 0.0,
) -> None:
    """Put a basis into the factors of a LoRA made by `lora_config`, and freeze what `mode` says.

    Raises:
        ModelError: `core` on a model whose weights are elsewhere (ZeRO-3).
    """
    for place, layer in lora_layers(adapted, subspace, sides):
        _fill(adapted, place, layer, subspace.basis.U, name)
    hold(adapted, subspace, mode, sides, name=name, soft_weight=soft_weight)


def hold(
    adapted: PeftModel,
    subspace: Subspace,
    mode: Mode,
    sides: tuple[Side, ...],
    *,
    name: str = "default",
    soft_weight: float = 0.0,
) -> None:
    """Freeze what `mode` says of an adapter that is in place: also after loading one to train on.

    A LoRA folder does not say which factor is frozen, so `PeftModel.from_pretrained(...,
    is_trainable=True)` trains both until this is called.
    """
    for place, layer in lora_layers(adapted, subspace, sides):
        factor = "lora_B" if place.side == "writers" else "lora_A"
        if mode == "freeze":
            freeze_factor(layer, factor, name)
        elif mode == "core":
            freeze_factor(layer, "lora_A", name)
            _make_core(place, layer, subspace.basis.U, name, adapted)
        elif mode == "soft":
            U = _folded(adapted, place, subspace.basis.U)
            lean_to(layer, name, U, place.side, soft_weight)


def lora_layers(
    adapted: PeftModel, subspace: Subspace, sides: tuple[Side, ...]
) -> Iterator[tuple[Place, LoraLayer]]:
    """Yield each matrix of a subspace with the LoRA layer on it."""
    base = adapted.get_base_model()
    assert isinstance(base, PreTrainedModel)
    for place in places(base, subspace.hook_point, sides):
        layer = base.get_submodule(place.path)
        assert isinstance(layer, LoraLayer)
        yield place, layer


@torch.no_grad()
def _fill(adapted: PeftModel, place: Place, layer: LoraLayer, U: Tensor, name: str) -> None:
    A, B = factors(layer, name)
    folded = _folded(adapted, place, U)
    if place.side == "writers":
        A.zero_()
        B.copy_(folded)
    else:
        A.copy_(folded.T)
        B.zero_()


def _folded(adapted: PeftModel, place: Place, U: Float[Tensor, "d_model r"]) -> Tensor:
    """Return G⁻¹ U, so that behind (or before) the norm it is U."""
    if place.norm is None:
        return U
    inverse = gentle_inverse(gain(adapted.get_base_model().get_submodule(place.norm)))
    return inverse.unsqueeze(1).to(U) * U.to(inverse.device)


@torch.no_grad()
def _make_core(place: Place, layer: LoraLayer, U: Tensor, name: str, adapted: PeftModel) -> None:
    """Leave only R to train, in lora_B = left R; lora_A is the other side's frozen directions."""
    base = layer.get_base_layer()
    weight = base.weight
    assert isinstance(weight, Tensor)
    if weight.numel() == 0:
        raise ModelError(
            "mode=core needs the model's weights, and ZeRO-3 has them elsewhere: use "
            "mode=freeze, or make the adapter before and load it"
        )
    W = weight.float() if isinstance(base, nn.Linear) else weight.float().T
    r = U.shape[1]
    A, B = factors(layer, name)
    if place.side == "writers":
        left = _folded(adapted, place, U)
        if not A.any():  # new, and not loaded: nothing is written yet
            B.zero_()
            A.copy_(torch.linalg.svd(U.T.to(W) @ W, full_matrices=False)[2][:r])
    else:
        left = torch.linalg.svd(W @ U.to(W), full_matrices=False)[0][:, :r]
    Core.put_on(layer.lora_B[name], left)
