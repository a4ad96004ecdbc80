"""Proposals: nothing twice, everything of a finite space, and better where it was better."""

from collections.abc import Sequence

import pytest

from sae_ray.adapters.proposals import Outcome, Proposals, Sampler
from sae_ray.adapters.settings import FinetuneSettings
from sae_ray.adapters.space import Point, Space, key_of

FINITE = "{adapter: [lora, residual], layers: [[0], [1, 2], [3]], hidden: [8, 16]}"
OPEN = "{adapter: [lora, residual], learning_rate: {low: 0.001, high: 0.1, log: true}}"


def proposals(
    text: str, sampler: Sampler = "tpe", seed: int = 0, known: Sequence[Outcome] = ()
) -> Proposals:
    return Proposals(Space.parse(text, FinetuneSettings()), sampler, seed, known)


def ended(point: Point) -> Outcome:
    return Outcome(point, [2.0, loss_of(point)])


@pytest.mark.parametrize("sampler", ["tpe", "random", "grid"])
def test_a_finite_space_is_gone_through_once(sampler: Sampler) -> None:
    asks = proposals(FINITE, sampler)
    points: list[Point] = []
    while (point := asks.ask()) is not None:
        points.append(point)
        asks.told(Outcome(point, [float(len(points))]))
    wanted = {key_of(one) for one in Space.parse(FINITE, FinetuneSettings()).grid()}
    assert len(points) == len(wanted) == 5
    assert {key_of(one) for one in points} == wanted


@pytest.mark.parametrize("sampler", ["tpe", "random", "grid"])
def test_what_is_known_is_not_asked_again(sampler: Sampler) -> None:
    known = [
        Outcome({"adapter": "lora", "layers": [1, 2]}, [1.0]),
        Outcome({"adapter": "residual", "hidden": 8}, []),
    ]
    asks = proposals(FINITE, sampler, known=known)
    points = []
    while (point := asks.ask()) is not None:
        points.append(key_of(point))
    assert len(points) == 3
    assert key_of({"adapter": "lora", "layers": [1, 2]}) not in points
    assert key_of({"adapter": "residual", "hidden": 8}) not in points


def loss_of(point: Point) -> float:
    """Return less for residual, and for rates near 0.01."""
    rate = point["learning_rate"]
    assert isinstance(rate, float)
    return (1.0 if point["adapter"] == "lora" else 0.0) + abs(rate - 0.01)


def num_good(asks: Proposals, num: int) -> int:
    """Ask and tell; count the points that are of the better kind."""
    good = 0
    for _ in range(num):
        point = asks.ask()
        assert point is not None
        asks.told(ended(point))
        good += point["adapter"] == "residual"
    return good


@pytest.mark.parametrize("replayed", [False, True])
def test_the_estimator_goes_where_losses_were_low_also_after_a_restart(replayed: bool) -> None:
    good = 0
    for seed in range(3):
        asks, told = proposals(OPEN, seed=seed), list[Point]()
        for _ in range(40):
            point = asks.ask()
            assert point is not None
            asks.told(ended(point))
            told.append(point)
        if replayed:
            asks = proposals(OPEN, seed=seed, known=[ended(point) for point in told])
        good += num_good(asks, 16)
    assert good >= 34  # of 48, of which 24 would be by chance
    assert sum(num_good(proposals(OPEN, "random", seed), 16) for seed in range(3)) < 34


@pytest.mark.parametrize("how", ["failed", "pruned"])
def test_the_estimator_leaves_what_failed_or_was_ended_early(how: str) -> None:
    def outcome(point: Point) -> Outcome:
        if point["adapter"] == "residual":
            return ended(point)
        return Outcome(point, [] if how == "failed" else [2.0], pruned=how == "pruned")

    good = 0
    for seed in range(3):
        asks = proposals(OPEN, seed=seed)
        for number in range(56):
            point = asks.ask()
            assert point is not None
            asks.told(outcome(point))
            good += number >= 40 and point["adapter"] == "residual"
    assert good >= 34  # of 48, of which 24 would be by chance


def test_a_blind_search_that_goes_on_finds_what_is_new() -> None:
    asks, known = proposals(OPEN, "random"), list[Outcome]()
    for _ in range(120):
        point = asks.ask()
        assert point is not None
        known.append(ended(point))
        asks.told(known[-1])
    again = proposals(OPEN, "random", known=known)
    assert all(again.ask() is not None for _ in range(5))


def test_a_seed_asks_for_the_same_points_first() -> None:
    def first(seed: int) -> list[Point | None]:
        asks = proposals(OPEN, seed=seed)
        return [asks.ask() for _ in range(5)]

    assert first(0) == first(0)
    assert first(0) != first(1)
