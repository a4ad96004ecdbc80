"""Proposals: nothing twice, everything of a finite space, and better where it was better."""

import pytest

from sae_ray.adapters.proposals import Proposals, Sampler
from sae_ray.adapters.settings import FinetuneSettings
from sae_ray.adapters.space import Point, Space, key_of

FINITE = "{adapter: [lora, residual], layers: [[0], [1, 2], [3]], hidden: [8, 16]}"
OPEN = "{adapter: [lora, residual], learning_rate: {low: 0.001, high: 0.1, log: true}}"


def proposals(text: str, sampler: Sampler = "tpe", seed: int = 0) -> Proposals:
    return Proposals(Space.parse(text, FinetuneSettings()), sampler, seed)


@pytest.mark.parametrize("sampler", ["tpe", "random", "grid"])
def test_a_finite_space_is_gone_through_once(sampler: Sampler) -> None:
    asks = proposals(FINITE, sampler)
    points: list[Point] = []
    while (point := asks.ask()) is not None:
        points.append(point)
        asks.told(point, float(len(points)))
    wanted = {key_of(one) for one in Space.parse(FINITE, FinetuneSettings()).grid()}
    assert len(points) == len(wanted) == 5
    assert {key_of(one) for one in points} == wanted


@pytest.mark.parametrize("sampler", ["tpe", "random", "grid"])
def test_what_is_known_is_not_asked_again(sampler: Sampler) -> None:
    asks = proposals(FINITE, sampler)
    asks.known({"adapter": "lora", "layers": [1, 2]}, 1.0)
    asks.known({"adapter": "residual", "hidden": 8}, None)
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
        asks.told(point, loss_of(point))
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
            asks.told(point, loss_of(point))
            told.append(point)
        if replayed:
            asks = proposals(OPEN, seed=100 + seed)
            for point in told:
                asks.known(point, loss_of(point))
        good += num_good(asks, 16)
    assert good >= 34  # of 48, of which 24 would be by chance
    assert sum(num_good(proposals(OPEN, "random", seed), 16) for seed in range(3)) < 34


def test_a_point_that_failed_is_told_and_the_search_goes_on() -> None:
    asks = proposals(OPEN)
    for _ in range(12):
        point = asks.ask()
        assert point is not None
        asks.told(point, None)
    assert asks.ask() is not None


def test_a_seed_asks_for_the_same_points_first() -> None:
    def first(seed: int) -> list[Point | None]:
        asks = proposals(OPEN, seed=seed)
        return [asks.ask() for _ in range(5)]

    assert first(0) == first(0)
    assert first(0) != first(1)
