import numpy as np
import pytest

from sae_ray.adapters.finetune import Look
from sae_ray.adapters.replies import RowLoss
from sae_ray.evaluate.expert import compare


def look(nats: list[float], general: list[float] | None = None) -> Look:
    rows = [[RowLoss(value, 10) for value in values] for values in (nats, general or [])]
    return Look(0, rows[0], rows[1])


def test_a_gain_on_every_row_is_beyond_its_interval_and_noise_is_not() -> None:
    rng = np.random.default_rng(0)
    base = rng.uniform(10, 40, 60)
    (better,) = compare(look(base.tolist()), look((base - 2).tolist()), "sft")
    assert better.name == "held_out_loss"
    assert better.gain == pytest.approx(0.2)
    assert better.low == pytest.approx(0.2)
    assert better.is_better
    (same,) = compare(look(base.tolist()), look((base + rng.normal(0, 5, 60)).tolist()), "sft")
    assert same.low < 0 < same.high
    assert not same.is_better


def test_the_interval_is_that_of_paired_rows() -> None:
    """Of rows that differ much but gain alike, pairing knows the gain and its lack does not."""
    rng = np.random.default_rng(0)
    base = rng.uniform(0, 1000, 40)
    gains = rng.normal(1, 0.5, 40)
    (found,) = compare(look(base.tolist()), look((base - gains).tolist()), "sft")
    spread = gains.std() / np.sqrt(40) / 10
    assert found.high - found.low == pytest.approx(2 * 1.96 * spread, rel=0.3)


def test_pairs_are_judged_by_which_reply_is_likelier() -> None:
    before = look([20.0, 10.0] * 5 + [10.0, 20.0] * 5)
    after = look([9.0, 10.0] * 10, [1.0])
    accuracy, margin = compare(before, after, "dpo")
    assert (accuracy.base, accuracy.expert, accuracy.num_rows) == (0.5, 1.0, 10)
    assert accuracy.is_better
    assert (margin.base, margin.expert) == (0.0, 1.0)
    before = look(before_nats(), [30.0, 20.0])
    *_, general = compare(before, look(before_nats(), [33.0, 22.0]), "dpo")
    assert (general.name, general.num_rows) == ("general_loss", 2)
    assert general.gain == pytest.approx(-0.25)


def before_nats() -> list[float]:
    return [20.0, 10.0] * 5
