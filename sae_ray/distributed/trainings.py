"""Trainings of a study: from a point of its space to what is trained, on which rows."""

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from sae_ray.adapters.attach import require_matrices
from sae_ray.adapters.edits import LATENT_KINDS
from sae_ray.adapters.examples import Example, PairExample, read_examples, read_pairs
from sae_ray.adapters.finetune import Material
from sae_ray.adapters.material import read_learnt, rows_path
from sae_ray.adapters.search_settings import SearchSettings
from sae_ray.adapters.settings import FinetuneSettings
from sae_ray.adapters.space import Point, Space
from sae_ray.chat import ChatTokenizer
from sae_ray.curate.scorer import ScorerConfig, check_pair
from sae_ray.curate.sources import EMBEDDED, fingerprint, locate_model, locate_source
from sae_ray.distributed.spans import keep_subspace, subspaces_of
from sae_ray.distributed.trial import Plan
from sae_ray.errors import ConfigError, PoolError, SaeRayError
from sae_ray.lm import HookPoint, load_config, require_layer

_OF_REFERENCE = {"lm", "data", "objective", "max_rows", "num_epochs", "max_steps", "batch_rows"}
_OF_REFERENCE |= {"micro_rows", "max_tokens", "general", "held_out_rows", "general_rows", "dtype"}
_OF_REFERENCE |= {"evaluate_every", "max_rejected", "sae"}
"""Settings that the default LoRA takes over: what it learns and how long, and not how."""
_READ = {"adapter", "data", "max_rows", "sae", "span_rows"}
"""What decides which rows and subspaces are needed."""


class Trainings:
    """What the points of a space stand for."""

    def __init__(self, settings: SearchSettings) -> None:
        """Read the space.

        Raises:
            ConfigError: it is none.
        """
        self.settings, self.space = settings, settings.find_space()
        self.lm = locate_model(settings.lm or EMBEDDED)
        self._subspaces: dict[tuple[str, ...], tuple[str, ...]] = {}
        self._points: dict[str, HookPoint] = {}

    def plan(self, number: int, point: Point, seed: int) -> Plan:
        """Return the training of a point; of none, that of the default LoRA."""
        settings = self.settings_of(point)
        saes = self._saes(settings)
        subspaces = self._subspaces.get(self._span_key(settings), ())
        recipe = settings.recipe.model_copy(update={"seed": seed})
        return Plan(number, settings.spec(saes, subspaces), recipe, self._material_key(settings))

    def settings_of(self, point: Point) -> FinetuneSettings:
        """Return the settings of a point; of none, those of the default LoRA."""
        if point:
            return self.space.settings(point)
        # A LoRA as this library trains it when nothing is said of how.
        values = self.settings.as_base().model_dump(include=_OF_REFERENCE, exclude_unset=True)
        return FinetuneSettings.model_validate({**values, "adapter": "lora", "num_workers": 0})

    def check(self, settings: FinetuneSettings) -> None:
        """Refuse what only shows once model and SAE are looked at.

        Raises:
            ConfigError: they do not fit each other, or the objective.
        """
        if settings.objective == "dpo" and settings.adapter == "full":
            raise ConfigError(
                "adapter=full with dpo has no base beside it to measure the distance from: leave "
                "full out"
            )
        try:
            saes = self._saes(settings)
            for sae in saes:
                self._point_of(sae)
            settings.spec(saes, saes)  # as many subspaces as SAEs
            for point in settings.hook_point or ():
                require_layer(HookPoint.parse(point), self._config, self.lm)
            require_matrices(self._skeleton, settings.targets, settings.layers)
        except ConfigError:
            raise
        except SaeRayError as error:
            raise ConfigError(str(error)) from None

    @functools.cached_property
    def _config(self) -> PretrainedConfig:
        return load_config(self.lm)

    @functools.cached_property
    def _skeleton(self) -> PreTrainedModel:
        """The model without its weights."""
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(self._config)

    def _point_of(self, sae: str) -> HookPoint:
        """Return where a SAE reads; it is loaded once, and held against the model."""
        if sae not in self._points:
            self._points[sae] = check_pair(ScorerConfig(self.lm, sae)).hook_point
        return self._points[sae]

    def _saes(self, settings: FinetuneSettings) -> tuple[str, ...]:
        named = (settings.sae or [EMBEDDED]) if settings.needs_sae else []
        return tuple(locate_source("sae", one) for one in named)

    def place(self, settings: FinetuneSettings) -> tuple[str, str]:
        """Return the layers and the component that a training changes."""
        if settings.adapter in LATENT_KINDS:
            own = [self._point_of(sae) for sae in self._saes(settings)]
            points = [HookPoint.parse(one) for one in settings.hook_point or ()] or own
            layers = sorted({one.layer for one in points})
            return "+".join(map(str, layers)), "+".join(sorted({one.site for one in points}))
        layers = "all" if settings.layers is None else "+".join(map(str, sorted(settings.layers)))
        if settings.adapter == "subspace":
            return layers, "subspace"
        return layers, "all" if settings.targets is None else "+".join(settings.targets)

    def folders(self) -> list[str]:
        """Return what every machine must see: model and SAEs, those named on the hub left out."""
        named = [self._saes(settings) for settings in self._sources()]
        paths = [self.lm, *(sae for saes in named for sae in saes)]
        return sorted({path for path in paths if Path(path).is_dir()})

    def parents(self) -> dict[str, str]:
        """Return the fingerprint of everything that trials are made of, by its role."""
        settings, found = self.settings, {"lm": fingerprint("lm", self.lm)}
        sources = self._sources()
        for data in {settings.data, *(one.data for one in sources)}:
            path = rows_path(data, settings.objective)
            found[f"data {data or EMBEDDED}"] = fingerprint("pool", path)
        named = [one.sae or [EMBEDDED] for one in sources if one.needs_sae]
        for sae in {sae for saes in named for sae in saes}:
            found[f"sae {sae}"] = fingerprint("sae", sae)
        for role in ("general", "retain", "positive", "reference", "control"):
            if (name := getattr(settings, role)) is not None:
                found[role] = fingerprint("pool", name)
        return found

    def _material_key(self, settings: FinetuneSettings) -> str:
        return json.dumps([rows_path(settings.data, settings.objective), settings.max_rows])

    def _sources(self) -> list[FinetuneSettings]:
        """Return settings of all combinations of what is read before anything is trained."""
        knobs = {name: knob for name, knob in self.space.knobs.items() if name in _READ}
        some = Space(knobs, self.settings.as_base())
        return [some.settings(point) for point in some.grid()]

    def materials(self, staging: str) -> dict[str, Material]:
        """Read the rows of every selection and budget; what is looked at is the same for all.

        Held-out rows are of the data given as --data, and are taken out of what any trial learns.
        """
        base = self.settings.as_base()
        data = rows_path(base.data, base.objective)
        first = read_learnt(base, data, self.lm, staging).material
        held = {mark for row in first.held_out for mark in _marks(row)}
        found = {self._material_key(base): first}
        self._require_step(first, data)
        tokenizer = ChatTokenizer.load(self.lm)
        read = read_pairs if base.objective == "dpo" else read_examples
        for settings in self._sources():
            key = self._material_key(settings)
            if key in found:
                continue
            source = rows_path(settings.data, base.objective)
            # As many more as are held out, so that a budget is what is learnt from.
            rows: list[Example] | list[PairExample] = read(
                source,
                tokenizer,
                max_tokens=base.max_tokens,
                max_rows=settings.max_rows + len(first.held_out),
                staging=staging,
            ).rows
            train = [row for row in rows if held.isdisjoint(_marks(row))][: settings.max_rows]
            found[key] = dataclasses.replace(first, train=train)
            self._require_step(found[key], source)
        return found

    def _require_step(self, material: Material, source: str) -> None:
        knob = self.space.knobs.get("batch_rows", [self.settings.batch_rows])
        largest = max(knob) if isinstance(knob, list) else int(knob.high)
        if len(material.train) < largest:
            raise PoolError(
                f"{source} leaves {len(material.train)} rows to learn from beside those held out, "
                f"fewer than a step's {largest}: give more, or a smaller batch_rows"
            )

    def _span_key(self, settings: FinetuneSettings) -> tuple[str, ...]:
        if settings.adapter != "subspace":
            return ()
        return (*self._saes(settings), self._material_key(settings), str(settings.span_rows))

    def span(self, materials: Mapping[str, Material], path: str, staging: str) -> None:
        """Make the subspaces that trials may ask for, in a folder where every node finds them."""
        for settings in self._sources():
            key = self._span_key(settings)
            if not key or key in self._subspaces:
                continue
            number = len(self._subspaces)
            local = subspaces_of(
                settings,
                rows_path(settings.data, settings.objective),
                self.lm,
                self._saes(settings),
                leave_out={row.id for row in materials[self._material_key(settings)].held_out},
                folder=Path(staging) / f"spans-{number}",
                staging=staging,
            )
            self._subspaces[key] = tuple(keep_subspace(one, f"{path}/{number}") for one in local)


def _marks(row: Example | PairExample) -> tuple[str, bytes]:
    """Return what tells a row from others, in a pool that names it otherwise too."""
    return row.id, row.content
