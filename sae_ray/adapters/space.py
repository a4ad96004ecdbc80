"""Space: which settings of a fine-tuning are tried, and which of their combinations can be.

A space names settings of `FinetuneSettings` and what each may be: a list of choices, or a range

    adapter: [lora, steering]
    learning_rate: {low: 0.001, high: 0.1, log: true}
    layers: [[0, 1], [2, 3]]

A setting that the kind of adapter does not look at is not drawn for it: a point of the space holds
what counts and nothing else, so that no two points are the same training.
"""

import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from sae_ray.adapters.edits import LATENT_KINDS
from sae_ray.adapters.settings import AdapterName, FinetuneSettings, of_others
from sae_ray.errors import ConfigError

Point = dict[str, Any]
"""A value for every setting that counts."""

KNOBS = (
    "adapter", "sae", "hook_point", "layers", "targets", "r", "alpha", "hidden", "positions",
    "l1", "mode", "span_rows", "data", "max_rows", "learning_rate", "warmup_share",
    "weight_decay", "max_gradient_norm", "num_epochs", "max_steps", "batch_rows", "beta",
    "packing", "retain_weight",
)  # fmt: skip
"""Settings that may be searched: those that change what is trained, and not how it is judged."""
_LISTS = ("sae", "hook_point", "layers", "targets")
"""Settings that are lists themselves: a single value stands for a list of one."""
_RANGES = (
    "r", "alpha", "hidden", "l1", "learning_rate", "warmup_share", "weight_decay",
    "max_gradient_norm", "num_epochs", "max_steps", "batch_rows", "beta", "retain_weight",
)  # fmt: skip
"""Settings that may be ranges: rows and subspaces are read before anything is trained."""
_WHOLE = ("r", "hidden", "max_steps", "batch_rows")
"""Ranges of whole numbers."""
_MAX_COMBINATIONS = 20_000
_BETWEEN = 3
"""Points of a range in a grid, unless it says."""


class Range(BaseModel):
    """Numbers between two; whole ones if both are."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    low: int | float
    high: int | float
    log: bool = False
    """Drawn by their logarithm."""
    points: int = _BETWEEN
    """How many of them a grid has."""

    @model_validator(mode="after")
    def _is_one(self) -> "Range":
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"low={self.low} and high={self.high}: give finite ones, low below")
        if self.log and self.low <= 0:
            raise ValueError(f"low={self.low} with log: a logarithm needs numbers above 0")
        if self.points < 2:
            raise ValueError(f"points={self.points}: a range has two ends, so two points at least")
        return self

    @property
    def is_whole(self) -> bool:
        """Say whether its numbers are whole."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    def fit(self, *, whole: bool) -> "Range":
        """Return it with ends of the kind that its setting takes, however they were written."""
        ends = (int(self.low), int(self.high)) if whole else (float(self.low), float(self.high))
        if ends != (self.low, self.high):
            raise ConfigError(f"low={self.low} and high={self.high}: give whole numbers")
        return Range.model_construct(low=ends[0], high=ends[1], log=self.log, points=self.points)

    def spread(self) -> list[int | float]:
        """Return points from end to end, evenly, or evenly by their logarithm."""
        shares = [i / (self.points - 1) for i in range(self.points)]
        if self.log:
            found = [self.low * (self.high / self.low) ** share for share in shares]
        else:
            found = [self.low + (self.high - self.low) * share for share in shares]
        found[0], found[-1] = self.low, self.high
        return sorted({round(one) for one in found}) if self.is_whole else found


Knob = list[Any] | Range
Suggest = Callable[[str, Knob], Any]
"""Chooses a value for a setting."""


class Space:
    """What may be drawn for each setting."""

    def __init__(self, knobs: Mapping[str, Knob], base: FinetuneSettings) -> None:
        """Take the choices and ranges, and the settings that hold where nothing is drawn.

        Raises:
            ConfigError: a setting counts for no kind of adapter that may be drawn.
        """
        self.knobs, self.base = dict(knobs), base
        kinds = self.kinds()
        if base.objective == "sft" and "beta" in knobs:
            raise ConfigError("space.beta counts for dpo alone: leave it out, or give --objective")
        if "max_steps" in knobs and "num_epochs" in knobs:
            raise ConfigError("space.max_steps is in place of space.num_epochs: leave one out")
        for name in knobs:
            if name != "adapter" and not any(_counts(name, kind) for kind in kinds):
                raise ConfigError(
                    f"space.{name} counts for no adapter of {', '.join(kinds)}: leave it "
                    "out, or search an adapter that has it (space.adapter)"
                )

    @classmethod
    def parse(cls, given: str | Mapping[str, Any], base: FinetuneSettings) -> "Space":
        """Read a space from a YAML file, from YAML or JSON itself, or as a config file has it.

        Raises:
            ConfigError: it is none, or names what is no setting that may be searched.
        """
        raw = _read(given) if isinstance(given, str) else given
        knobs: dict[str, Knob] = {}
        for name, values in raw.items():
            if name not in KNOBS:
                raise ConfigError(
                    f"space.{name} is no setting that may be searched: those are {', '.join(KNOBS)}"
                )
            knobs[name] = _knob(name, values)
        if not knobs:
            raise ConfigError(
                "the space is empty: name a setting and what it may be, such as adapter: [lora, "
                "steering]"
            )
        return cls(knobs, base)

    def propose(self, suggest: Suggest) -> Point:
        """Draw a point: the kind of adapter first, then what counts for it."""
        point: Point = {}
        if "adapter" in self.knobs:
            point["adapter"] = suggest("adapter", self.knobs["adapter"])
        kind = self._kind(point)
        for name, knob in self.knobs.items():
            if name != "adapter" and _counts(name, kind):
                point[name] = suggest(name, knob)
        return point

    def grid(self) -> Iterator[Point]:
        """Yield every combination of choices with points of the ranges."""
        for kind in self.kinds():
            first: Point = {"adapter": kind} if "adapter" in self.knobs else {}
            names = [name for name in self.knobs if name != "adapter" and _counts(name, kind)]
            knobs = [self.knobs[name] for name in names]
            spreads = [one.spread() if isinstance(one, Range) else one for one in knobs]
            for values in itertools.product(*spreads):
                yield {**first, **dict(zip(names, values, strict=True))}

    @property
    def is_finite(self) -> bool:
        """Say whether it holds choices alone."""
        return all(isinstance(knob, list) for knob in self.knobs.values())

    def settings(self, point: Point) -> FinetuneSettings:
        """Return the settings of a point: those of the base with its values.

        Raises:
            ConfigError: they cannot go together.
        """
        kind = self._kind(point)
        values = self.base.model_dump(
            include=set(FinetuneSettings.model_fields) - of_others(kind), exclude_unset=True
        )
        for name, value in point.items():
            values[name] = [value] if name in _LISTS and not isinstance(value, list) else value
        # A trial trains in its own process; what takes its best point on may use more.
        values |= {"adapter": kind, "num_workers": 0}
        try:
            return FinetuneSettings.model_validate(values)
        except ValidationError as error:
            said = "; ".join(_told(one) for one in error.errors())
            raise ConfigError(f"{tell(point)} cannot be: {said}") from None

    def require_possible(self, check: Callable[[FinetuneSettings], None]) -> int:
        """Look at every combination, of ranges at their ends, before anything is trained.

        Returns:
            how many there are.

        Raises:
            ConfigError: one cannot be, and which; or there are too many to look at.
        """
        ends: dict[str, Any] = {
            name: knob if isinstance(knob, list) else list(dict.fromkeys((knob.low, knob.high)))
            for name, knob in self.knobs.items()
        }
        number = 0
        for point in Space(ends, self.base).grid():
            number += 1
            if number > _MAX_COMBINATIONS:
                raise ConfigError(
                    f"the space has more than {_MAX_COMBINATIONS:,} combinations of choices: give "
                    "fewer, or ranges ({low: ..., high: ...}) in place of long lists"
                )
            settings = self.settings(point)
            try:
                check(settings)
            except ConfigError as error:
                raise ConfigError(f"{tell(point)} cannot be: {error}") from None
        return number

    def kinds(self) -> list[AdapterName]:
        """Return the kinds of adapter that may be drawn."""
        knob = self.knobs.get("adapter")
        return (
            [self._kind({"adapter": one}) for one in knob]
            if isinstance(knob, list)
            else [self.base.adapter]
        )

    def _kind(self, point: Point) -> AdapterName:
        kind = point.get("adapter", self.base.adapter)
        if kind not in get_args(AdapterName):
            raise ConfigError(
                f"space.adapter={kind!r} is no kind of adapter: those are "
                f"{', '.join(get_args(AdapterName))}"
            )
        return kind  # pyright: ignore[reportReturnType]


def tell(point: Point) -> str:
    """Return a point as one would type it."""
    return ", ".join(f"{name}={_shown(value)}" for name, value in point.items()) or "the defaults"


def key_of(point: Point) -> str:
    """Return what tells a point from others."""
    return json.dumps(point, sort_keys=True)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return "+".join(map(_shown, value))
    return str(value)


def _counts(name: str, kind: AdapterName) -> bool:
    if name in ("sae", "span_rows"):
        return kind == "subspace" or (name == "sae" and kind in LATENT_KINDS)
    return name not in of_others(kind)


def _knob(name: str, values: Any) -> Knob:
    if isinstance(values, Mapping):
        if name not in _RANGES:
            raise ConfigError(
                f"space.{name}={dict(values)} is a range, which {', '.join(_RANGES)} may be: give "
                "a list of choices"
            )
        try:
            return Range.model_validate(values).fit(whole=name in _WHOLE)
        except ValidationError as error:
            said = "; ".join(_told(one) for one in error.errors())
            raise ConfigError(
                f"space.{name}={dict(values)} is no range ({said}): give low and high, and log: "
                "true if they are to be drawn by their logarithm"
            ) from None
    if not isinstance(values, list) or not values:
        raise ConfigError(
            f"space.{name}={values!r}: give a list of choices, or a range {{low: ..., high: ...}}"
        )
    if len({json.dumps(one) for one in values}) < len(values):
        raise ConfigError(f"space.{name}={values} holds a choice twice: leave one of them out")
    return values


def _read(given: str) -> Mapping[str, Any]:
    is_text = given.lstrip().startswith("{") or "\n" in given
    try:
        content = yaml.safe_load(given if is_text else Path(given).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(
            f"--space {given!r} cannot be read ({' '.join(str(error).split())}): give a YAML file, "
            "or the space itself, such as '{adapter: [lora, steering]}'"
        ) from None
    if not isinstance(content, Mapping):
        raise ConfigError(
            f"--space {given!r} holds no settings: write lines such as 'adapter: [lora, steering]'"
        )
    return content


def _told(detail: Mapping[str, Any]) -> str:
    name = ".".join(str(part) for part in detail["loc"])
    message = str(detail["msg"]).removeprefix("Value error, ")
    return f"{name}={detail['input']!r}: {message}" if name else message
