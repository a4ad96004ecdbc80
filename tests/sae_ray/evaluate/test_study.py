"""A study: rows and seeds drawn together, the base and the default beside, the best first."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sae_ray.adapters.trial import Glance, Judged, Status, TrialRecord
from sae_ray.errors import TrainingError
from sae_ray.evaluate.study import finalists, finished, measured, over_seeds, ranked, table_of

TOKENS = [10, 20, 30, 40] * 5


def judged(nats_a_token: float, noise: float = 0.0, seed: int = 0) -> Judged:
    rng = np.random.default_rng(seed)
    rows = [(n * (nats_a_token + noise * float(rng.normal())), n) for n in TOKENS]
    return Judged(held_out=rows, general=[(5.0, 5)])


def record(
    number: int, loss: float, best: Judged | None = None, *, status: Status = "finished"
) -> TrialRecord:
    looks = [
        Glance(
            step=step, total=4, seconds=1.0 * step, loss=value, general_loss=1.0,
            divergence=None, counts=step > 0,
        )
        for step, value in ((0, 2.0), (4, loss))
    ]  # fmt: skip
    return TrialRecord(
        number=number, role="searched", point={"r": number}, seed=0, layer="0", component="all",
        status=status, reason="out of memory" if status == "failed" else None,
        glances=looks, base=judged(2.0), best=best or judged(loss),
    )  # fmt: skip


def test_a_gain_is_of_nats_a_token_over_all_rows_and_the_mean_over_runs() -> None:
    one = Judged(held_out=[(10.0, 10), (60.0, 30)], general=[])
    other = Judged(held_out=[(20.0, 10), (40.0, 30)], general=[])
    base = Judged(held_out=[(40.0, 10), (80.0, 30)], general=[])
    gain = over_seeds([base], [one, other], "sft")
    assert gain.base == pytest.approx(3.0)
    assert gain.expert == pytest.approx((70 / 40 + 60 / 40) / 2)
    assert gain.gain == pytest.approx(gain.base - gain.expert)
    assert gain.low < gain.gain < gain.high
    assert gain.num_rows == 2


def test_pairs_are_counted_where_the_chosen_reply_is_the_likelier() -> None:
    right = Judged(held_out=[(1.0, 5), (2.0, 5), (3.0, 5), (1.0, 5)], general=[])
    wrong = Judged(held_out=[(2.0, 5), (1.0, 5), (3.0, 5), (1.0, 5)], general=[])
    gain = over_seeds([wrong], [right], "dpo")
    assert (gain.base, gain.expert, gain.gain) == (0.0, 0.5, 0.5)


def test_what_is_the_same_has_no_gain_and_no_doubt_of_it() -> None:
    gain = over_seeds([judged(1.0, 0.3)], [judged(1.0, 0.3)], "sft")
    assert (gain.gain, gain.low, gain.high) == (0.0, 0.0, 0.0)


def test_seeds_that_differ_widen_the_interval() -> None:
    near = [judged(1.0 + 0.001 * i) for i in range(3)]
    apart = [judged(1.0 + 0.3 * i) for i in range(3)]
    widths = [
        gain.high - gain.low
        for gain in (over_seeds([judged(2.0)], runs, "sft") for runs in (near, apart))
    ]
    assert widths[1] > 20 * widths[0]


def test_intervals_over_three_seeds_hold_the_truth_as_often_as_they_say() -> None:
    rng, held = np.random.default_rng(0), 0
    for _ in range(200):
        sides = [
            [judged(1.0 + 0.05 * float(rng.normal()), 0.02, seed=i) for i in range(3)]
            for _ in range(2)
        ]
        gain = over_seeds(sides[0], sides[1], "sft")
        held += gain.low <= 0 <= gain.high
    assert held >= 180  # a bootstrap of three runs holds it in about 150


def test_failed_trials_are_never_chosen_and_pruned_ones_may_be_tried_again() -> None:
    records = [
        record(0, 1.0),
        record(1, 0.5, status="failed"),
        record(2, 0.8, status="pruned"),
        record(3, 1.2),
    ]
    assert [one.number for one in ranked(records, 2)] == [2, 0]
    assert [one.number for one in finished(records)] == [0, 3]
    assert measured(records[2], "sft")[0].gain == pytest.approx(1.2)


def test_the_best_is_first_by_the_rows_that_choose_not_by_those_that_judge() -> None:
    default = [record(10, 1.0), record(11, 1.0)]
    lucky = [record(20, 1.1, judged(0.1)), record(21, 1.1, judged(0.1))]
    better = [record(30, 0.9, judged(0.9)), record(31, 0.7, judged(0.7))]
    found = finalists([lucky, better], default, "sft")
    assert [one.trial.number for one in found] == [30, 10, 20]
    assert found[0].chooses == pytest.approx(0.8)
    assert found[0].gain.gain == pytest.approx(1.2)
    assert found[0].over_default is not None
    assert found[0].over_default.gain == pytest.approx(0.2)
    assert found[1].over_default is None


def test_finalists_whose_runs_failed_are_left_out_and_none_at_all_is_an_error() -> None:
    broken = [record(40, 0.1, status="failed"), record(41, 0.1, status="failed")]
    half = [record(50, 0.9), record(51, 0.1, status="failed")]
    found = finalists([broken, half], [record(10, 1.0)], "sft")
    found_runs = [(one.trial.number, len(one.seeds), one.num_failed) for one in found]
    assert found_runs == [(10, 1, 0), (50, 1, 1)]  # what fails now and then is not the best
    without = finalists([half], broken, "sft")
    assert without[0].over_default is None
    assert without[0].num_failed == 1
    with pytest.raises(TrainingError, match="no finalist came to its end \\(out of memory\\)"):
        finalists([broken], broken, "sft")


def test_the_table_has_a_row_a_trial() -> None:
    records = [record(0, 1.0), record(1, 0.5, status="failed").model_copy(update={"best": None})]
    gains = {one.number: measured(one, "sft") for one in records}
    rows = pq.read_table(pa.BufferReader(table_of(records, gains))).to_pylist()
    assert [row["status"] for row in rows] == ["finished", "failed"]
    assert rows[0]["gain"] == pytest.approx(1.0)
    assert (rows[0]["steps"], rows[0]["total_steps"], rows[0]["best_step"]) == (4, 4, 4)
    assert rows[1]["gain"] is None
    assert rows[1]["reason"] == "out of memory"
    assert json.loads(rows[1]["point"]) == {"r": 1}
