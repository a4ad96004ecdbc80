"""Trainings side by side on Ray Tune: all told of, ended early where behind, none lost."""

import contextlib
import os
import signal
import time
from pathlib import Path

import psutil
import pytest
import ray

from sae_ray.adapters.attach import AdapterSpec
from sae_ray.adapters.examples import read_examples, split
from sae_ray.adapters.finetune import Material
from sae_ray.adapters.recipe import Recipe
from sae_ray.chat import ChatTokenizer
from sae_ray.distributed.search import Ended, InOrder, Places, Under, run_trials
from sae_ray.distributed.trial import Plan, Workshop
from sae_ray.errors import ConfigError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def plan(number: int, rate: float, steps: int = 4) -> Plan:
    recipe = Recipe(
        learning_rate=rate, max_steps=steps, batch_rows=4, micro_rows=4, evaluate_every=2
    )
    return Plan(number, AdapterSpec(kind="lora", r=4), recipe, "rows")


@pytest.fixture
def workshop(tiny_lm: Path, tiny_pool: Path) -> Workshop:
    """A tiny model and forty conversations."""
    rows = read_examples(str(tiny_pool), ChatTokenizer.load(tiny_lm), max_tokens=256).rows
    train, held_out = split(rows[:40], 8, seed=0)
    return Workshop(str(tiny_lm), {"rows": Material(train, held_out, [], max_tokens=256)})


def ends(told: list[Ended | Under]) -> dict[int, Ended]:
    return {one.plan.number: one for one in told if isinstance(one, Ended)}


def require_back(free: float) -> None:
    """Wait until all cores are free again: Ray gives back an actor's when it has seen it die."""
    deadline = time.monotonic() + 60
    while ray.available_resources().get("CPU") != free and time.monotonic() < deadline:
        time.sleep(0.2)
    assert ray.available_resources()["CPU"] == free


def test_every_training_is_told_of_one_that_fails_too_and_all_cores_come_back(
    ray_cluster: None, workshop: Workshop
) -> None:
    free = ray.available_resources()["CPU"]
    asks = InOrder([plan(0, 1e-2), plan(1, 1e30), plan(2, 1e-2)])
    told = list(run_trials(asks, 9, workshop, Places(2, 1, 0.0), prune=False))
    ended = ends(told)
    assert sorted(ended) == [0, 1, 2]
    assert ended[1].reason is not None
    assert "learning_rate" in ended[1].reason
    assert not ended[1].pruned
    for number in (0, 2):
        assert ended[number].reason is None
        assert [one.step for one in ended[number].glances] == [0, 2, 4]
        assert ended[number].base is not None
        assert ended[number].best is not None
    # The same plan gives the same numbers, also by a worker that has trained another before.
    losses = [[one.loss for one in ended[number].glances] for number in (0, 2)]
    assert losses[0] == losses[1]
    assert sum(isinstance(one, Under) for one in told) >= 6
    require_back(free)


def test_a_training_that_is_behind_is_ended_at_a_look(
    ray_cluster: None, workshop: Workshop
) -> None:
    asks = InOrder([plan(0, 2e-2, 6), plan(1, 1e-7, 6)])
    ended = ends(list(run_trials(asks, 2, workshop, Places(1, 1, 0.0), prune=True)))
    assert not ended[0].pruned
    assert ended[0].glances[-1].step == 6
    assert ended[1].pruned
    assert ended[1].glances[-1].step == 2
    kept = ends(
        list(
            run_trials(
                InOrder([plan(0, 2e-2, 6), plan(1, 1e-7, 6)]), 2, workshop, Places(1, 1, 0.0),
                prune=False,
            )
        )
    )  # fmt: skip
    assert not kept[1].pruned
    assert kept[1].glances[-1].step == 6


def busy_workers() -> list[psutil.Process]:
    """Return the trials' processes of this test's own Ray, which are named so while they train."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "ray::ResourceTrainable" in " ".join(process.cmdline()):
                found.append(process)
    return found


def test_a_worker_that_is_killed_is_begun_anew_and_nothing_is_told_twice(
    ray_cluster: None, workshop: Workshop
) -> None:
    told, killed = list[Ended | Under](), 0
    asks = InOrder([plan(0, 1e-2, 60)])
    for one in run_trials(asks, 1, workshop, Places(1, 1, 0.0), prune=False):
        told.append(one)
        while not killed and isinstance(one, Under) and one.glance.step >= 4:
            for process in busy_workers():
                os.kill(process.pid, signal.SIGKILL)
                killed += 1
    (ended,) = ends(told).values()
    assert killed
    assert ended.reason is None
    assert [one.step for one in ended.glances] == list(range(0, 61, 2))
    steps = [one.glance.step for one in told if isinstance(one, Under)]
    assert steps.count(0) == 2  # it began twice, and the record holds one training


def test_trainings_that_nobody_listens_to_are_ended_and_cores_come_back(
    ray_cluster: None, workshop: Workshop
) -> None:
    free = ray.available_resources()["CPU"]
    asks = InOrder([plan(number, 1e-2, 4000) for number in range(3)])
    told = run_trials(asks, 3, workshop, Places(2, 1, 0.0), prune=False)
    assert isinstance(next(told), Under)
    told.close()
    require_back(free)
    assert not busy_workers()


def test_no_training_at_all_starts_nothing(workshop: Workshop) -> None:
    assert list(run_trials(InOrder([]), 0, workshop, Places(1, 1, 0.0), prune=True)) == []


def test_a_space_that_holds_no_more_ends_the_search(ray_cluster: None, workshop: Workshop) -> None:
    assert list(run_trials(InOrder([]), 2, workshop, Places(1, 1, 0.0), prune=True)) == []


def test_gpus_that_are_not_there_are_refused(ray_cluster: None) -> None:
    with pytest.raises(ConfigError, match="the cluster has no GPU"):
        Places.plan(None, 0.5)
    assert Places.plan(3, None).count == 3
