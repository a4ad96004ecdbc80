from collections.abc import Callable

import pytest

from sae_ray.adapters.stepwise import Stepwise


def test_a_run_becomes_its_events_and_stops_when_nobody_listens() -> None:
    taken: list[int] = []

    def run(happened: Callable[[int], None]) -> None:
        for number in range(3):
            taken.append(number)
            happened(number)
        raise ValueError("at the end")

    events = Stepwise[int](run).events()
    assert next(events) == 0
    assert taken == [0]  # it waits: the next step is not taken before it is asked for
    assert next(events) == 1
    events.close()
    assert taken == [0, 1]
    taken.clear()
    with pytest.raises(ValueError, match="at the end"):
        list(Stepwise[int](run).events())
    assert taken == [0, 1, 2]
