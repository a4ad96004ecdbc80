"""Proposals: what a search tries next, by Optuna or in the order of a grid, and never twice."""

import dataclasses
import random
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import Trial, TrialState, create_trial

from sae_ray.adapters.space import Knob, Point, Range, Space, key_of

Sampler = Literal["tpe", "random", "grid"]
"""How points are chosen: by what the last ones came to (tpe), blindly, or all in order."""

_TRIES = 100
"""Points that are drawn for one that is new, before every point is taken to be known."""
_NUM_BLIND = 8
"""Points that are drawn blindly before the sampler has something to go by."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a point."""

    point: Point
    losses: list[float]
    """At its looks, in order: the least so far. None of a failure."""
    pruned: bool = False

    @property
    def state(self) -> TrialState:
        """Return it as the estimator takes it: a failure is worse than all that was ended early."""
        return TrialState.PRUNED if self.pruned or not self.losses else TrialState.COMPLETE


class Proposals:
    """Points of a space, one after the other.

    Optuna's estimator (TPE, Bergstra et al. 2011), of all settings together and by groups of those
    that count together, with points under way taken to be bad, so that workers do not crowd.
    """

    def __init__(
        self, space: Space, sampler: Sampler, seed: int, known: Sequence[Outcome] = ()
    ) -> None:
        """Begin with what was tried in an earlier run."""
        self.space = space
        self._seen: set[str] = set()
        self._asked: dict[str, Trial] = {}
        self._grid: list[Point] = []
        if sampler == "grid" or space.is_finite:
            self._grid = list(space.grid())
            random.Random(seed).shuffle(self._grid)  # a grid that is cut short is one of all parts
        self._in_order = sampler == "grid"
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        # A run that goes on draws other numbers: the first ones are known.
        chooses = _sampler_of(sampler, seed + len(known))
        self._study = optuna.create_study(sampler=chooses, direction="minimize")
        for one in known:
            self._know(one)

    def _know(self, one: Outcome) -> None:
        self._seen.add(key_of(one.point))
        finished = one.state is TrialState.COMPLETE
        self._study.add_trial(
            create_trial(
                state=one.state,
                value=min(one.losses) if finished else None,
                params={name: self._drawn(name, value) for name, value in one.point.items()},
                distributions={name: _distribution(self.space.knobs[name]) for name in one.point},
                intermediate_values=dict(enumerate(one.losses)),
            )
        )

    def ask(self) -> Point | None:
        """Return a point that was never returned; None when there is none left."""
        if self._in_order:
            return self._take(None, self._next_of_grid())
        for _ in range(_TRIES):
            trial = self._study.ask()
            point = self.space.propose(lambda name, knob, on=trial: _suggest(on, name, knob))
            if key_of(point) not in self._seen:
                return self._take(trial, point)
            self._study.tell(trial, state=TrialState.FAIL)
        return self._take(None, self._next_of_grid())

    def told(self, outcome: Outcome) -> None:
        """Take what came of a point."""
        trial = self._asked.pop(key_of(outcome.point), None)
        if trial is None:  # of the grid: it is known without having been drawn
            if not self._in_order:
                self._know(outcome)
            return
        for number, loss in enumerate(outcome.losses):
            trial.report(loss, number)
        finished = outcome.state is TrialState.COMPLETE
        value = min(outcome.losses) if finished else None
        self._study.tell(trial, value, state=outcome.state)

    def _take(self, trial: Trial | None, point: Point | None) -> Point | None:
        if point is not None:
            self._seen.add(key_of(point))
            if trial is not None:
                self._asked[key_of(point)] = trial
        return point

    def _next_of_grid(self) -> Point | None:
        return next((one for one in self._grid if key_of(one) not in self._seen), None)

    def _drawn(self, name: str, value: Any) -> int | float:
        """Return a value as Optuna has it: the number of a choice, or a number of a range."""
        knob = self.space.knobs[name]
        return value if isinstance(knob, Range) else knob.index(value)  # pyright: ignore


def _sampler_of(sampler: Sampler, seed: int) -> optuna.samplers.BaseSampler:
    if sampler != "tpe":
        return optuna.samplers.RandomSampler(seed=seed)
    with warnings.catch_warnings():
        # Options that Optuna calls experimental since 2.2 and 2.8.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(
            seed=seed,
            n_startup_trials=_NUM_BLIND,
            multivariate=True,
            group=True,
            constant_liar=True,
        )


def _distribution(knob: Knob) -> BaseDistribution:
    if not isinstance(knob, Range):
        return CategoricalDistribution(range(len(knob)))
    if knob.is_whole:
        return IntDistribution(int(knob.low), int(knob.high), log=knob.log)
    return FloatDistribution(float(knob.low), float(knob.high), log=knob.log)


def _suggest(trial: Trial, name: str, knob: Knob) -> Any:
    if isinstance(knob, list):
        # By number: Optuna's choices cannot be lists.
        return knob[trial.suggest_categorical(name, range(len(knob)))]
    if knob.is_whole:
        return trial.suggest_int(name, int(knob.low), int(knob.high), log=knob.log)
    return trial.suggest_float(name, knob.low, knob.high, log=knob.log)
