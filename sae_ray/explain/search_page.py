"""The page of a study: the best settings, how sure that is, and where training helps."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from sae_ray.adapters.space import Knob, tell
from sae_ray.adapters.trial import TrialRecord
from sae_ray.experts.card import Measure
from sae_ray.explain.filled import fill

_WIDTH, _HEIGHT, _TOP = 960.0, 240.0, 34.0
"""Of the picture of parallel coordinates, and the room for its names."""
_CURVE_WIDTH, _CURVE_HEIGHT = 640.0, 160.0
_SHADES = 5


@runtime_checkable
class Finalist(Protocol):
    """Settings trained with several seeds, as `sae_ray.evaluate.study` compares them."""

    @property
    def trial(self) -> TrialRecord:
        """Return the run with the seed of the search."""
        ...

    @property
    def seeds(self) -> list[TrialRecord]:
        """Return all of its runs that went to their end."""
        ...

    @property
    def num_failed(self) -> int:
        """Return how many did not."""
        ...

    @property
    def chooses(self) -> float:
        """Return their mean loss on the rows that choose."""
        ...

    @property
    def gain(self) -> Measure:
        """Return what they gain over the base on the other rows."""
        ...

    @property
    def over_default(self) -> Measure | None:
        """Return what they gain over the default LoRA; None for itself."""
        ...


@dataclasses.dataclass(frozen=True)
class Axis:
    """A setting as an upright line, its values from bottom to top."""

    name: str
    x: float
    ticks: list[tuple[float, str]]
    """Height and text."""


@dataclasses.dataclass(frozen=True)
class Line:
    """A trial as a line through the axes that count for it, or over its steps."""

    number: int
    points: str
    kind: str
    """What it is drawn as: best, finished, pruned."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """The best of what was tried at a layer and component."""

    trial: TrialRecord
    gain: Measure
    num_trials: int
    shade: int
    """Of the gains of all cells, from 0 to 5."""


@dataclasses.dataclass(frozen=True)
class SearchPage:
    """All that the page says."""

    knobs: Mapping[str, Knob]
    records: Sequence[TrialRecord]
    gains: Mapping[int, Sequence[Measure]]
    """Of each trial over its base, by the rows that choose nothing; empty where it has failed."""
    finalists: Sequence[Finalist]
    """The best first."""
    best: Mapping[str, Any]
    """Settings of the best, as jobs/finetune.py takes them."""
    settings: Mapping[str, Any]
    objective: str

    @property
    def space(self) -> dict[str, str]:
        """Return what was tried, in words."""
        return {name: _described(knob) for name, knob in self.knobs.items()}

    @property
    def figure(self) -> str:
        """Return what is measured."""
        return "pairs ranked right" if self.objective == "dpo" else "nats a token"

    @property
    def tried(self) -> list[TrialRecord]:
        """Return what was searched, and the default LoRA; not the further seeds."""
        first = [one for one in self.records if one.role == "reference"][:1]
        return [one for one in self.records if one.role == "searched"] + first

    @property
    def summary(self) -> str:
        """Say in a sentence or two what came of it."""
        best, num = self.finalists[0], len(self.tried)
        early, failed = (self._count(status) for status in ("pruned", "failed"))
        said = (
            f"Of {num} trials ({early} ended early, {failed} failed) the best by the rows that "
            f"choose is {named(best.trial)}: over {len(best.seeds)} seeds, on other rows, it is "
            f"{_better(best.gain, self.figure)} than the base"
        )
        if not best.trial.point:
            return said + "; nothing that was tried comes before it."
        if best.over_default is None:
            return said + "; the default LoRA did not come to its end, to compare with."
        return said + f", and {_better(best.over_default, self.figure)} than the default LoRA."

    @property
    def doubt(self) -> str | None:
        """Say where the search has not paid beyond its interval."""
        best = self.finalists[0]
        if best.num_failed:
            return f"{best.num_failed} of its runs failed, as did runs of all others."
        if not best.gain.is_better:
            return "No setting beats the base beyond the interval: give more rows, or other data."
        if best.over_default is not None and not best.over_default.is_better:
            return (
                "The interval of its advantage over the default LoRA holds zero: by these rows and "
                "seeds, the default may do as well."
            )
        return None

    @property
    def seconds(self) -> float:
        """Return what all trainings took, one after the other."""
        return sum(one.seconds for one in self.records)

    @property
    def saved(self) -> float:
        """Return the share of the steps of the search that ending early has saved."""
        last = [one.glances[-1] for one in self.tried if one.glances]
        total = sum(one.total for one in last)
        return 1 - sum(one.step for one in last) / total if total else 0.0

    @property
    def layers(self) -> list[str]:
        """Return the layers that were tried."""
        return sorted({one.layer for one in self.tried}, key=lambda name: (len(name), name))

    @property
    def components(self) -> list[str]:
        """Return the components that were tried."""
        return sorted({one.component for one in self.tried})

    @property
    def cells(self) -> dict[tuple[str, str], Cell]:
        """Return the best trial of each layer and component, ended early or not."""
        groups: dict[tuple[str, str], list[TrialRecord]] = {}
        for one in self.tried:
            groups.setdefault((one.layer, one.component), []).append(one)
        best = {
            place: min(found, key=lambda one: one.loss or math.inf)
            for place, group in groups.items()
            if (found := [one for one in group if self.gains.get(one.number)])
        }
        gains = {place: self.gains[one.number][0] for place, one in best.items()}
        high = max((one.gain for one in gains.values()), default=0.0)
        return {
            place: Cell(
                trial=one,
                gain=gains[place],
                num_trials=len(groups[place]),
                shade=round(_SHADES * max(0.0, gains[place].gain) / high) if high > 0 else 0,
            )
            for place, one in best.items()
        }

    @property
    def axes(self) -> list[Axis]:
        """Return the axes of the picture: every setting, and the loss."""
        losses = [one.loss for one in self.tried if one.loss is not None]
        low, high = min(losses), max(losses)
        step = _WIDTH / (len(self.knobs) + 1)
        found = [
            Axis(name, round(step * (i + 0.5), 1), _ticks(knob))
            for i, (name, knob) in enumerate(self.knobs.items())
        ]
        ends = [(_TOP, f"{low:.3g}"), (_TOP + _HEIGHT, f"{high:.3g}")]
        return [*found, Axis("loss", round(_WIDTH - step / 2, 1), ends)]

    @property
    def lines(self) -> list[Line]:
        """Return every trial that has a loss as a line through the axes, the best last."""
        losses = [one.loss for one in self.tried if one.loss is not None]
        low, span = min(losses), (max(losses) - min(losses)) or 1.0
        axes = self.axes
        found = []
        for one in self.tried:
            if one.loss is None or not one.point:  # the default LoRA is no point of the space
                continue
            points = [
                f"{axis.x},{_height(self.knobs[axis.name], one.point[axis.name]):.1f}"
                for axis in axes[:-1]
                if axis.name in one.point
            ]
            points.append(f"{axes[-1].x},{_TOP + _HEIGHT * (one.loss - low) / span:.1f}")
            found.append(Line(one.number, " ".join(points), self._kind(one)))
        return sorted(found, key=lambda line: line.kind == "best")

    @property
    def curves(self) -> list[Line]:
        """Return the losses over the steps, in shares of each trial's own, the best last."""
        seen = [look.loss for one in self.tried for look in one.glances]
        low, high = min(seen), self.highest
        found = []
        for one in self.tried:
            points = [
                f"{_CURVE_WIDTH * look.step / look.total:.1f},"
                f"{_CURVE_HEIGHT * (1 - (min(look.loss, high) - low) / ((high - low) or 1)):.1f}"
                for look in one.glances
            ]
            if len(points) > 1:
                found.append(Line(one.number, " ".join(points), self._kind(one)))
        return sorted(found, key=lambda line: line.kind == "best")

    @property
    def lowest(self) -> float:
        """Return the least loss that any look saw."""
        return min(look.loss for one in self.tried for look in one.glances)

    @property
    def highest(self) -> float:
        """Return the loss at the top of the curves: a little above the base's; more is cut."""
        first = [one.glances[0].loss for one in self.tried if one.glances]
        return max(first) + 0.25 * (max(first) - self.lowest)

    def _kind(self, one: TrialRecord) -> str:
        return "best" if one.point == self.finalists[0].trial.point else one.status

    def _count(self, status: str) -> int:
        return sum(one.status == status for one in self.tried)


def render(page: SearchPage) -> str:
    """Return the page as one file that needs no network."""
    values = {"page": page, "named": named, "width": _WIDTH, "height": _TOP + _HEIGHT, "top": _TOP}
    return fill("search.html.jinja", values, style="report.css", script=None)


def named(trial: TrialRecord) -> str:
    """Return the settings of a trial in words."""
    return tell(trial.point) if trial.point else "the default LoRA"


def _better(one: Measure, figure: str) -> str:
    way = "better" if one.gain >= 0 else "worse"
    low, high = (one.low, one.high) if one.gain >= 0 else (-one.high, -one.low)
    return f"{abs(one.gain):.3f} [{low:.3f}, {high:.3f}] {figure} {way}"


def _described(knob: Knob) -> str:
    if isinstance(knob, list):
        return ", ".join(map(_text, knob))
    return f"{knob.low:g} to {knob.high:g}" + (", by its logarithm" if knob.log else "")


def _text(value: Any) -> str:
    if isinstance(value, list):
        return "+".join(map(_text, value))
    if isinstance(value, str) and "/" in value:
        return value.rstrip("/").rpartition("/")[2]  # the last part of a path tells it apart
    return f"{value:g}" if isinstance(value, float) else str(value)


def _ticks(knob: Knob) -> list[tuple[float, str]]:
    if isinstance(knob, list):
        return [(round(_height(knob, one), 1), _text(one)) for one in knob]
    return [(round(_height(knob, one), 1), f"{one:g}") for one in (knob.low, knob.high)]


def _height(knob: Knob, value: Any) -> float:
    """Return where on its axis a value is: the first choice, or the highest number, at the top."""
    if isinstance(knob, list):
        share = (knob.index(value) + 0.5) / len(knob)
    else:
        number: Any = value
        ends: Any = (knob.low, knob.high)
        if knob.log:
            number, ends = math.log(number), tuple(map(math.log, ends))
        share = 1 - (number - ends[0]) / (ends[1] - ends[0])
    return _TOP + _HEIGHT * share
