"""Ray Tune over trainings: several at a time, ended early where others are ahead, none lost.

Tune decides who runs and who is ended (ASHA, Li et al. 2020); what is tried next is asked of
`Proposals`, and every end is told to whoever iterates. Nothing is restored from Tune's own files,
which are pickles: a search goes on from its records, and knows from them what was tried.
"""

import dataclasses
import logging
import queue
import tempfile
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import ray
import ray.tune
from ray.exceptions import RayError
from ray.tune import (
    Callback,
    CheckpointConfig,
    FailureConfig,
    RunConfig,
    Stopper,
    TuneConfig,
    Tuner,
)
from ray.tune.error import TuneError
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler
from ray.tune.search import ConcurrencyLimiter, Searcher

from sae_ray.adapters.trial import Glance, Glimpse, Judged
from sae_ray.distributed.gang import environment
from sae_ray.distributed.runtime import plan_workers
from sae_ray.distributed.trial import LOOK, LOSS, Plan, Training, Workshop
from sae_ray.errors import ConfigError, WorkError

_DRIVER_ENV = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # Tune writes down its state for restoring it, which we never do.
    "TUNE_GLOBAL_CHECKPOINT_S": "100000",
}
_REDUCTION = 2


@dataclasses.dataclass(frozen=True)
class Places:
    """How many trainings run at a time, and what each takes."""

    count: int
    num_cpus: int
    num_gpus: float

    @classmethod
    def plan(cls, count: int | None, gpus_per_trial: float | None) -> "Places":
        """Share out the cluster's GPUs, or its cores where it has none.

        Raises:
            ConfigError: GPUs are asked for where there are none.
        """
        workers = plan_workers(None)
        if workers.num_gpus:
            each = gpus_per_trial or 1.0
            fit = workers.count * int(1 / each)
            return cls(min(count or fit, fit), workers.num_cpus, each)
        if gpus_per_trial is not None:
            raise ConfigError(
                f"--gpus_per_trial={gpus_per_trial} and the cluster has no GPU: leave it out"
            )
        nodes = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
        # On one machine fewer trials than cores share out all of them.
        cores = int(min(nodes[0], workers.count)) if len(nodes) == 1 else 1
        many = count or workers.count
        return cls(many, max(1, cores // many), 0.0)


@dataclasses.dataclass(frozen=True)
class Ended:
    """What came of a training."""

    plan: Plan
    glances: list[Glance]
    base: Judged | None
    best: Judged | None
    num_parameters: int
    pruned: bool
    reason: str | None
    """Why it failed, if it has."""


@dataclasses.dataclass(frozen=True)
class Under:
    """What a training under way has said last."""

    plan: Plan
    glance: Glance


@runtime_checkable
class Asks(Protocol):
    """Whoever knows what is to be trained next."""

    def ask(self) -> Plan | None:
        """Return the next training; None when there is none."""
        ...

    def told(self, ended: Ended) -> None:
        """Take what came of one."""
        ...


class InOrder:
    """Trainings that are known beforehand."""

    def __init__(self, plans: Sequence[Plan]) -> None:
        self._left: Iterator[Plan] = iter(plans)

    def ask(self) -> Plan | None:
        """Return the next one."""
        return next(self._left, None)

    def told(self, ended: Ended) -> None:
        """Take note of nothing: what is next does not depend on it."""


def run_trials(
    asks: Asks, num: int, workshop: Workshop, places: Places, *, prune: bool
) -> Generator[Ended | Under, None, None]:
    """Train what is asked for, several at a time; yield looks and ends as they come.

    Args:
        asks: says what is next.
        num: trainings at most.
        workshop: what they share; it goes to every machine once.
        places: how many at a time.
        prune: end those early that are behind the better half of those as far on (ASHA).

    Raises:
        WorkError: the cluster failed.
    """
    if num < 1:
        return
    happened: queue.Queue[Ended | Under | BaseException | None] = queue.Queue()
    unheard = _Unheard()
    with tempfile.TemporaryDirectory(prefix="sae-ray-tune-") as folder, environment(_DRIVER_ENV):
        logging.getLogger("ray.tune").setLevel(
            logging.CRITICAL
        )  # what fails is told with its reason
        tuner = _tuner(asks, num, workshop, places, prune, folder, happened.put, unheard)
        thread = threading.Thread(target=_fit, args=(tuner, happened.put), daemon=True)
        thread.start()
        try:
            while (one := happened.get()) is not None:
                if isinstance(one, BaseException):
                    raise one
                yield one
        finally:
            unheard.set()
            thread.join()


class _Unkept:
    """What Tune writes into its own files, which nobody reads, without what it holds."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _Unheard(_Unkept, Stopper):
    """Ends all trainings at their next look, when nobody listens any more."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def set(self) -> None:
        self._event.set()

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return self._event.is_set()

    def stop_all(self) -> bool:
        return self._event.is_set()


class _Next(_Unkept, Searcher):
    """Tune's way of asking what is next."""

    def __init__(self, asks: Asks, num: int) -> None:
        super().__init__(metric=LOSS, mode="min")
        self._asks, self._left = asks, num

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # pyright: ignore
        plan = self._asks.ask() if self._left else None
        if plan is None:
            return Searcher.FINISHED
        self._left -= 1
        return {"plan": plan}

    def on_trial_complete(
        self, trial_id: str, result: dict | None = None, error: bool = False
    ) -> None:
        pass  # told by _Recorder, which knows more


class _Recorder(_Unkept, Callback):
    """Gathers what each trial says, and tells when it has ended."""

    def __init__(self, asks: Asks, tell: Callable[[Ended | Under], None]) -> None:
        self._asks, self._tell = asks, tell
        self._seen: dict[str, list[Glimpse]] = {}

    def on_trial_result(
        self, iteration: int, trials: list, trial: Any, result: dict, **info: Any
    ) -> None:
        glimpse: Glimpse | None = result.get("glimpse")
        if glimpse is None:
            return
        seen = self._seen.setdefault(trial.trial_id, [])
        if seen and glimpse.glance.step <= seen[-1].glance.step:
            seen.clear()  # its worker died, and it has begun anew
        seen.append(glimpse)
        self._tell(Under(trial.config["plan"], glimpse.glance))

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        last = trial.last_result
        self._end(trial, pruned="ended" not in last, reason=last.get("failed"))

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        place = trial.error_file
        text = Path(place).read_text(errors="replace") if place and Path(place).exists() else ""
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        said = lines[-1] if lines else "Ray's log of it says more"
        self._end(trial, pruned=False, reason=f"its worker failed: {said}")

    def _end(self, trial: Any, *, pruned: bool, reason: str | None) -> None:
        seen = self._seen.pop(trial.trial_id, [])
        counted = [one for one in seen if one.glance.counts and one.judged is not None]
        ended = Ended(
            plan=trial.config["plan"],
            glances=[one.glance for one in seen],
            base=seen[0].judged if seen and seen[0].glance.step == 0 else None,
            best=counted[-1].judged if counted else None,
            num_parameters=seen[0].num_parameters if seen else 0,
            pruned=pruned and reason is None,
            reason=reason,
        )
        self._asks.told(ended)
        self._tell(ended)


def _tuner(
    asks: Asks,
    num: int,
    workshop: Workshop,
    places: Places,
    prune: bool,
    folder: str,
    tell: Callable[[Any], None],
    unheard: Stopper,
) -> Tuner:
    resources = {"cpu": places.num_cpus} | ({"gpu": places.num_gpus} if places.num_gpus else {})
    trainable = ray.tune.with_resources(
        ray.tune.with_parameters(Training, workshop=workshop), resources
    )
    asha = ASHAScheduler(
        time_attr=LOOK,
        metric=LOSS,
        mode="min",
        max_t=10**6,  # a training knows its own end
        grace_period=1,
        reduction_factor=_REDUCTION,
    )
    return Tuner(
        trainable,
        tune_config=TuneConfig(
            search_alg=ConcurrencyLimiter(_Next(asks, num), max_concurrent=places.count),
            scheduler=asha if prune else FIFOScheduler(),
            num_samples=num,
            reuse_actors=True,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=RunConfig(
            name="study",
            storage_path=folder,
            verbose=0,
            stop=unheard,
            checkpoint_config=CheckpointConfig(checkpoint_at_end=False),
            failure_config=FailureConfig(max_failures=workshop.max_failures),
            callbacks=[_Recorder(asks, tell)],
        ),
    )


def _fit(tuner: Tuner, tell: Callable[[Any], None]) -> None:
    try:
        tuner.fit()
    except (TuneError, RayError) as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        tell(WorkError(f"Ray Tune failed ({said[-1]}): run the same line again; it goes on"))
    except BaseException as error:  # noqa: BLE001 - handed to whoever iterates
        tell(error)
    tell(None)
