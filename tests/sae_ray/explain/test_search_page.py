"""The page of a study: what it says is what the records hold, and it says so where it is unsure."""

import dataclasses
from typing import Any

import pytest

from sae_ray.adapters.settings import FinetuneSettings
from sae_ray.adapters.space import Point, Space
from sae_ray.adapters.trial import Glance, Judged, Role, Status, TrialRecord
from sae_ray.evaluate.study import Finalist
from sae_ray.experts.card import Measure
from sae_ray.explain.search_page import SearchPage, render

SPACE = Space.parse(
    "{adapter: [lora, steering], learning_rate: {low: 0.01, high: 1.0, log: true}, layers: [[0],"
    " [1]]}",
    FinetuneSettings(),
)


def record(
    number: int,
    point: Point,
    loss: float,
    place: tuple[str, str] = ("0", "all"),
    status: Status = "finished",
    role: Role = "searched",
    reason: str | None = None,
) -> TrialRecord:
    looks = [
        Glance(
            step=step, total=4, seconds=2.0 * step, loss=value, general_loss=1.0,
            divergence=None, counts=step > 0,
        )
        for step, value in ((0, 2.0), (2 if status == "pruned" else 4, loss))
    ]  # fmt: skip
    kept = Judged(held_out=[(loss, 1), (loss, 1)], general=[])
    return TrialRecord(
        number=number, role=role, point=point, seed=0, layer=place[0], component=place[1],
        status=status, reason=reason, num_parameters=12, glances=looks, base=kept, best=kept,
    )  # fmt: skip


def measure(gain: float, low: float, high: float) -> Measure:
    return Measure(
        name="held_out_loss", base=2.0, expert=2.0 - gain, gain=gain, low=low, high=high, num_rows=2
    )


def final(
    seeds: list[TrialRecord], gain: Measure, over: Measure | None, num_failed: int = 0
) -> Finalist:
    return Finalist(seeds, num_failed, 1.0, gain, over)


def page(over: Measure | None = None, gain: Measure | None = None, **changes: Any) -> SearchPage:
    records = [
        record(0, {"adapter": "lora", "learning_rate": 0.1, "layers": [1]}, 1.0, ("1", "all")),
        record(1, {"adapter": "lora", "learning_rate": 1.0, "layers": [0]}, 1.5, status="pruned"),
        record(2, {"adapter": "lora", "learning_rate": 0.01, "layers": [0]}, 1.2),
        record(
            3, {"adapter": "steering", "learning_rate": 0.01}, 9.0, ("2", "resid_post"),
            "failed", reason="<script>alert(1)</script>",
        ),
        record(4, {}, 1.4, ("all", "all"), role="reference"),
        record(5, {"adapter": "lora", "learning_rate": 0.1, "layers": [1]}, 1.0, role="finalist"),
    ]  # fmt: skip
    gains = {one.number: [measure(2 - (one.loss or 0), 0.1, 0.9)] for one in records}
    gains[3] = []
    best = final([records[0], records[5]], gain or measure(1.0, 0.8, 1.2), over)
    values: dict[str, Any] = {
        "knobs": SPACE.knobs,
        "records": records,
        "gains": gains,
        "finalists": [best, final([records[4]], measure(0.6, 0.5, 0.7), None)],
        "best": {"adapter": "lora"},
        "settings": {"seed": 0},
        "objective": "sft",
    }
    return SearchPage(**(values | changes))


def test_the_summary_says_what_is_best_over_what_and_by_how_much() -> None:
    said = page(measure(0.4, 0.1, 0.7)).summary
    assert said.startswith("Of 5 trials (1 ended early, 1 failed) the best by the rows that choose")
    assert "adapter=lora, learning_rate=0.1, layers=1: over 2 seeds" in said
    assert "1.000 [0.800, 1.200] nats a token better than the base" in said
    assert "0.400 [0.100, 0.700] nats a token better than the default LoRA" in said
    worse = page(measure(-0.4, -0.7, -0.1)).summary
    assert "0.400 [0.100, 0.700] nats a token worse than the default LoRA" in worse


@pytest.mark.parametrize(
    ("over", "gain", "said"),
    [
        (measure(0.4, 0.1, 0.7), None, None),
        (measure(0.1, -0.1, 0.3), None, "the default may do as well"),
        (measure(0.4, 0.1, 0.7), measure(0.1, -0.2, 0.4), "No setting beats the base"),
    ],
)
def test_where_the_search_has_not_paid_the_page_says_so(
    over: Measure | None, gain: Measure | None, said: str | None
) -> None:
    found = page(over, gain)
    assert found.doubt is None if said is None else said in (found.doubt or "")
    assert said is None or said in render(found)


def test_a_default_that_failed_is_told_from_a_default_that_is_best() -> None:
    assert "the default LoRA did not come to its end" in page(None).summary
    assert "none to compare with" in render(page(None))
    best = final([record(4, {}, 1.4, role="reference")], measure(0.6, 0.5, 0.7), None)
    found = page(finalists=[best])
    assert "nothing that was tried comes before it" in found.summary
    assert found.doubt is None
    failed = dataclasses.replace(best, num_failed=1)
    assert "1 of its runs failed" in (page(finalists=[failed]).doubt or "")


def test_a_cell_holds_the_best_of_its_place_with_its_interval() -> None:
    found = page()
    cell = found.cells["0", "all"]
    assert (cell.trial.number, cell.num_trials, cell.gain.low) == (2, 2, 0.1)
    assert found.cells["1", "all"].shade == 5
    assert ("2", "resid_post") not in found.cells  # it failed
    assert found.layers == ["0", "1", "2", "all"]


def test_lines_go_through_what_counts_and_end_at_their_loss() -> None:
    found = page()
    lines = {line.number: line for line in found.lines}
    assert 4 not in lines  # the default LoRA is no point of the space
    assert len(lines[3].points.split()) == 3  # steering has no layers
    assert len(lines[0].points.split()) == 4
    assert [line.kind for line in found.lines][-1] == "best"
    names = [axis.name for axis in found.axes]
    assert names == ["adapter", "learning_rate", "layers", "loss"]
    rate = found.axes[1]
    heights = [float(lines[n].points.split()[1].split(",")[1]) for n in (1, 0, 2)]
    assert heights[0] < heights[1] < heights[2]  # high rates are at the top
    assert heights[1] == pytest.approx((heights[0] + heights[2]) / 2)  # by the logarithm
    assert sorted(y for y, _ in rate.ticks) == [heights[0], heights[2]]


def test_what_was_saved_is_told_and_further_seeds_are_no_trials() -> None:
    found = page()
    assert len(found.tried) == 5
    assert found.saved == pytest.approx(2 / 20)
    assert found.seconds == pytest.approx(5 * 8 + 4)


def test_the_page_escapes_what_trials_say_and_holds_all_of_them() -> None:
    text = render(page())
    assert "<script>" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert text.count("<polyline") == 4 + 5
    assert "Content-Security-Policy" in text
    assert "not tried" in text
