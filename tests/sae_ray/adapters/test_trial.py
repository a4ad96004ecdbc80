"""A trial: the base first, the half that chooses apart from the half that judges, what counts."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from sae_ray.adapters.attach import AdapterSpec
from sae_ray.adapters.examples import read_examples, read_pairs, split
from sae_ray.adapters.finetune import Finetuning, Material
from sae_ray.adapters.recipe import Recipe
from sae_ray.adapters.trial import Glance, Judged, TrialRecord, run_trial
from sae_ray.chat import ChatTokenizer
from sae_ray.errors import TrainingError

LORA = AdapterSpec(kind="lora", r=4)


def recipe(**changes: Any) -> Recipe:
    few: dict[str, Any] = {"max_steps": 4, "batch_rows": 4, "micro_rows": 4, "evaluate_every": 2}
    return Recipe(**{"learning_rate": 1e-2, **few, **changes})


@pytest.fixture
def sft(tiny_lm: Path, tiny_pool: Path) -> Material:
    """Conversations, eight of which are looked at."""
    tokenizer = ChatTokenizer.load(tiny_lm)
    rows = read_examples(str(tiny_pool), tokenizer, max_tokens=256).rows
    train, held_out = split(rows[:40], 8, seed=0)
    return Material(train, held_out, rows[40:44], max_tokens=256)


@pytest.fixture
def dpo(tiny_lm: Path, tmp_path: Path, sft: Material) -> Material:
    """Pairs, eight of which are looked at."""
    path = tmp_path / "pairs.jsonl"
    rows = [
        {"id": f"{i}", "prompt": f"Say {i}", "chosen": f"yes {i}", "rejected": f"no, {i}"}
        for i in range(24)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = read_pairs(str(path), ChatTokenizer.load(tiny_lm), max_tokens=64).rows
    return Material(pairs[:16], pairs[16:], sft.general, max_tokens=64)


def test_a_trial_begins_with_the_base_and_keeps_the_rows_of_its_best(
    tiny_lm: Path, sft: Material, tmp_path: Path
) -> None:
    seen = list(run_trial(str(tiny_lm), LORA, recipe(), sft, tmp_path / "a"))
    assert [one.glance.step for one in seen] == [0, 2, 4]
    assert [one.glance.counts for one in seen] == [False, True, True]
    assert {one.glance.total for one in seen} == {4}
    assert seen[0].num_parameters > 0
    finetuning = Finetuning(str(tiny_lm), LORA, recipe(), sft, tmp_path / "b")
    looks = [step.look for step in finetuning.steps() if step.look is not None]
    for one, look in zip(seen, looks, strict=True):
        chooses, judges = look.halves("sft")
        assert one.glance.loss == pytest.approx(chooses.loss("sft"))
        if one.judged is not None:
            assert one.judged == Judged.of(look, "sft")
            assert [row[0] for row in one.judged.held_out] == [row.nats for row in judges.held_out]
    least = min(seen[1:], key=lambda one: one.glance.loss)
    assert seen[0].judged is not None
    assert least.judged is not None


def test_the_look_of_a_record_is_what_was_kept(
    tiny_lm: Path, sft: Material, tmp_path: Path
) -> None:
    (first, *_) = run_trial(str(tiny_lm), LORA, recipe(max_steps=1), sft, tmp_path)
    assert first.judged is not None
    kept = Judged.model_validate_json(first.judged.model_dump_json())
    assert Judged(held_out=kept.held_out[::1], general=kept.general) == first.judged
    look = kept.look(7)
    assert look.number == 7
    assert [(one.nats, one.num_tokens) for one in look.held_out] == kept.held_out
    assert len(look.held_out) == len(sft.held_out) // 2


def test_a_look_of_pairs_counts_as_far_as_it_stays_near_the_base(
    tiny_lm: Path, dpo: Material, tmp_path: Path
) -> None:
    settings = recipe(objective="dpo", learning_rate=5e-2)
    seen = list(run_trial(str(tiny_lm), LORA, settings, dpo, tmp_path / "a"))
    apart = [one.glance.divergence for one in seen]
    assert apart[0] == pytest.approx(0.0, abs=1e-6)
    assert apart[-1] is not None
    assert apart[-1] > 1e-4
    bound = (apart[1] + apart[2]) / 2 if apart[1] < apart[2] else apart[1] / 2  # pyright: ignore
    near = list(run_trial(str(tiny_lm), LORA, settings, dpo, tmp_path / "b", max_divergence=bound))
    expected = [one.glance.step > 0 and one.glance.divergence <= bound for one in near]  # pyright: ignore
    assert [one.glance.counts for one in near] == expected
    assert not all(expected[1:])


def test_a_training_that_ends_in_no_number_says_so(
    tiny_lm: Path, sft: Material, tmp_path: Path
) -> None:
    with pytest.raises(TrainingError, match="learning_rate"):
        list(run_trial(str(tiny_lm), LORA, recipe(learning_rate=1e30), sft, tmp_path))


def test_whoever_stops_at_a_look_stops_the_training(
    tiny_lm: Path, sft: Material, tmp_path: Path
) -> None:
    looks = run_trial(str(tiny_lm), LORA, recipe(max_steps=400), sft, tmp_path)
    assert next(looks).glance.step == 0
    assert next(looks).glance.step == 2
    looks.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert next(looks, None) is None


def glance(step: int, loss: float, counts: bool) -> Glance:
    return Glance(
        step=step,
        total=4,
        seconds=float(step),
        loss=loss,
        general_loss=None,
        divergence=None,
        counts=counts,
    )


def test_a_record_is_best_at_its_least_loss_that_counts() -> None:
    record = TrialRecord(
        number=1, role="searched", point={}, seed=0, layer="all", component="all",
        status="finished",
        glances=[glance(0, 0.1, False), glance(2, 0.5, True), glance(4, 0.3, False)],
    )  # fmt: skip
    assert record.loss == 0.5
    assert record.chosen is not None
    assert record.chosen.step == 2
    assert record.seconds == 4.0
    none = record.model_copy(update={"glances": record.glances[:1]})
    assert none.loss is None
    assert math.isclose(none.seconds, 0.0)
