import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sae_ray.adapters.attach import AdapterSpec
from sae_ray.adapters.basis import build_basis
from sae_ray.adapters.examples import (
    TOO_LONG,
    Example,
    PairExample,
    read_examples,
    read_pairs,
    split,
)
from sae_ray.adapters.finetune import Finetuning, Look, Material, Step
from sae_ray.adapters.loading import load_causal
from sae_ray.adapters.objectives import in_order
from sae_ray.adapters.recipe import Recipe
from sae_ray.adapters.replies import RowLoss, row_losses
from sae_ray.adapters.subspace import Subspace
from sae_ray.chat import ChatTokenizer
from sae_ray.errors import ConfigError, ModelError, PoolError, TrainingError
from sae_ray.sae.pretrained import load_encoder

LORA = AdapterSpec(kind="lora", r=2)


@pytest.fixture
def rows(tiny_lm: Path, tiny_pool: Path) -> list[Example]:
    """Forty conversations as examples."""
    tokenizer = ChatTokenizer.load(tiny_lm)
    return read_examples(str(tiny_pool), tokenizer, max_tokens=256).rows[:40]


@pytest.fixture
def pairs(tiny_lm: Path, tmp_path: Path) -> list[PairExample]:
    """Sixteen pairs."""
    path = tmp_path / "pairs.jsonl"
    lines = [
        {"prompt": f"Question {i}?", "chosen": f"Yes {i}.", "rejected": f"No, never {i}."}
        for i in range(16)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return read_pairs(str(path), ChatTokenizer.load(tiny_lm), max_tokens=128).rows


def recipe(**changes: Any) -> Recipe:
    settings = {
        "max_steps": 4,
        "batch_rows": 4,
        "micro_rows": 2,
        "evaluate_every": 2,
        "learning_rate": 1e-2,
        "warmup_share": 0.0,
    }
    return Recipe(**(settings | changes))


def material(rows: Sequence[Any], **more: Any) -> Material:
    train, held_out = split(rows, 8, seed=0)
    return Material(train, held_out, more.pop("general", []), max_tokens=256, **more)


def losses(steps: Sequence[Step]) -> list[float]:
    return [step.figures["loss"] for step in steps if "loss" in step.figures]


def mean_of(model: Any, rows: Sequence[Example]) -> float:
    found = row_losses(model.eval(), rows, micro_rows=7, pad=0)
    return sum(row.nats for row in found) / sum(row.num_tokens for row in found)


def base_of(tiny_lm: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_lm, dtype=torch.float32)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_the_loss_that_is_trained_is_the_loss_that_is_measured(
    rows: list[Example], tiny_lm: Path, tmp_path: Path
) -> None:
    settings = recipe(batch_rows=32, micro_rows=8, max_steps=1)
    finetuning = Finetuning(str(tiny_lm), LORA, settings, material(rows), tmp_path / "a")
    (first,) = losses(list(finetuning.steps()))
    expected = mean_of(base_of(tiny_lm), finetuning.material.train)  # pyright: ignore[reportArgumentType]
    assert first == pytest.approx(expected, abs=1e-5)


def test_packed_rows_are_blind_to_each_other(
    rows: list[Example], tiny_lm: Path, tmp_path: Path
) -> None:
    short = [row for row in rows if len(row.ids) < 100][:6]
    settings = recipe(batch_rows=1, micro_rows=1, max_steps=1, packing=True)
    packed = Material(short, rows[:4], [], max_tokens=6 * 100)
    finetuning = Finetuning(str(tiny_lm), LORA, settings, packed, tmp_path / "a")
    assert len(finetuning.trainer.train_dataset) == 1  # pyright: ignore
    (loss,) = losses(list(finetuning.steps()))
    assert loss == pytest.approx(mean_of(base_of(tiny_lm), short), abs=1e-5)


def test_the_first_loss_of_dpo_is_ln_2_also_when_it_goes_on_from_sft(
    rows: list[Example], pairs: list[PairExample], tiny_lm: Path, tmp_path: Path
) -> None:
    sft = Finetuning(str(tiny_lm), LORA, recipe(), material(rows), tmp_path / "sft")
    list(sft.steps())
    sft.save(tmp_path / "expert")
    for start in (None, tmp_path / "expert"):
        folder, settings = tmp_path / f"dpo-{start is None}", recipe(objective="dpo")
        given = material(pairs)
        dpo = Finetuning(str(tiny_lm), LORA, settings, given, folder, start_from=start)
        found = losses(list(dpo.steps()))
        assert found[0] == pytest.approx(math.log(2), abs=1e-6)
        assert found[-1] < 0.69


def test_a_run_taken_up_again_ends_at_the_unbroken_runs_weights(
    rows: list[Example], tiny_lm: Path, tmp_path: Path
) -> None:
    def new(name: str) -> Finetuning:
        given = material(rows, general=rows[:3], retain=rows[3:9])
        settings = recipe(max_steps=6, retain_weight=0.5)
        return Finetuning(str(tiny_lm), LORA, settings, given, tmp_path / name)

    unbroken = new("unbroken")
    list(unbroken.steps())
    unbroken.save(tmp_path / "expected")
    for step in new("broken").steps():
        if step.checkpoint and step.number == 4:
            break
    again = new("again")
    list(again.steps(tmp_path / "broken/checkpoint-4"))
    again.save(tmp_path / "found")
    expected, found = weights(tmp_path / "expected"), weights(tmp_path / "found")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert again.looks == unbroken.looks


def test_staying_near_the_base_keeps_rows_that_are_retained(
    rows: list[Example], tiny_lm: Path, tmp_path: Path
) -> None:
    def drift(weight: float) -> float:
        given = material(rows[:20], general=rows[20:30], retain=rows[20:30])
        settings = recipe(max_steps=12, evaluate_every=12, retain_weight=weight)
        finetuning = Finetuning(str(tiny_lm), LORA, settings, given, tmp_path / f"{weight}")
        list(finetuning.steps())
        before, after = (look.general for look in finetuning.looks)
        return sum(abs(a.nats - b.nats) for a, b in zip(before, after, strict=True))

    assert drift(10.0) < 0.5 * drift(0.0)


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_all_weights_can_be_trained_instead(
    rows: list[Example], pairs: list[PairExample], tiny_lm: Path, tmp_path: Path, objective: str
) -> None:
    given = material(rows if objective == "sft" else pairs)
    settings = recipe(objective=objective, gradient_checkpointing=True)
    finetuning = Finetuning(str(tiny_lm), None, settings, given, tmp_path / "run")
    found = losses(list(finetuning.steps()))
    if objective == "dpo":
        assert found[0] == pytest.approx(math.log(2), abs=1e-6)
    finetuning.save(tmp_path / "model")
    model, base = base_of(tmp_path / "model"), base_of(tiny_lm)
    assert finetuning.num_parameters == finetuning.num_base_parameters
    both = zip(model.parameters(), base.parameters(), strict=True)
    assert all(not torch.equal(a, b) for a, b in both)


def test_a_saved_adapter_is_plain_peft_and_says_what_was_measured(
    rows: list[Example], tiny_lm: Path, tmp_path: Path
) -> None:
    finetuning = Finetuning(str(tiny_lm), LORA, recipe(), material(rows), tmp_path / "run")
    list(finetuning.steps())
    finetuning.save(tmp_path / "expert")
    names = {path.name for path in (tmp_path / "expert").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors"}
    num_saved = sum(one.numel() for one in weights(tmp_path / "expert").values())
    assert num_saved == finetuning.num_parameters
    model = PeftModel.from_pretrained(base_of(tiny_lm), str(tmp_path / "expert")).eval()
    found = row_losses(model, finetuning.material.held_out, micro_rows=2, pad=0)  # pyright: ignore[reportArgumentType]
    expected = [row.nats for row in finetuning.best.held_out]
    assert [row.nats for row in found] == pytest.approx(expected, rel=1e-5)


def test_training_stops_where_held_out_rows_no_longer_gain(
    rows: list[Example], tiny_lm: Path, tmp_path: Path
) -> None:
    settings = recipe(max_steps=12, learning_rate=0.3, evaluate_every=1, patience=2)
    finetuning = Finetuning(str(tiny_lm), LORA, settings, material(rows), tmp_path / "run")
    numbers = [step.number for step in finetuning.steps()]
    assert finetuning.stopped_early
    assert max(numbers) == finetuning.best.number + 2 < 12


def test_a_loss_that_is_no_number_stops_the_run(
    rows: list[Example], tiny_lm: Path, tmp_path: Path
) -> None:
    finetuning = Finetuning(str(tiny_lm), LORA, recipe(), material(rows), tmp_path / "run")
    with torch.no_grad():
        next(p for p in finetuning.model.parameters() if p.requires_grad).fill_(float("nan"))
    with pytest.raises(TrainingError, match="the loss of step 1 is nan"):
        list(finetuning.steps())


def test_settings_that_cannot_be_met_are_refused(
    rows: list[Example], tiny_lm: Path, tmp_path: Path
) -> None:
    def new(settings: Recipe, adapter: AdapterSpec | None = LORA, **more: Any) -> None:
        given = material(rows, retain=rows[:4])
        Finetuning(str(tiny_lm), adapter, settings, given, tmp_path / "run", **more)

    with pytest.raises(ConfigError, match="batch_rows=64"):
        new(recipe(batch_rows=64))
    with pytest.raises(ConfigError, match="cannot be shared by 3 workers"):
        recipe().micro_rows_for(3)
    with pytest.raises(ConfigError, match="full fine-tuning does not keep"):
        new(recipe(retain_weight=1.0), None)
    with pytest.raises(ConfigError, match="packing goes with sft"):
        recipe(packing=True, objective="dpo")
    with pytest.raises(ModelError, match="is no adapter of this model"):
        new(recipe(), start_from=tmp_path / "nowhere")


def test_bad_rows_are_rejected_with_their_reasons(tiny_lm: Path, tmp_path: Path) -> None:
    path, tokenizer = tmp_path / "pool.jsonl", ChatTokenizer.load(tiny_lm)
    user = {"role": "user", "content": "Hi"}
    good = {"messages": [user, {"role": "assistant", "content": "Ho"}]}
    bad = {
        "no assistant turn to learn from": {"messages": [user]},
        TOO_LONG: {"messages": [user, {"role": "assistant", "content": "long " * 200}]},
        "content is not text": {"messages": [user, {"role": "assistant", "content": 3}]},
    }
    path.write_text("\n".join(map(json.dumps, [good, *bad.values()])))
    found = read_examples(str(path), tokenizer, max_tokens=64)
    assert [(row.row, row.reason) for row in found.rejected] == list(enumerate(bad, start=1))
    assert len(found.rows) == 1
    path.write_text("\n".join(map(json.dumps, bad.values())))
    with pytest.raises(PoolError, match="holds nothing to learn from"):
        read_examples(str(path), tokenizer, max_tokens=64)


def test_a_subspaces_core_is_saved_as_the_lora_that_it_makes(
    rows: list[Example], tiny_lm: Path, tiny_sae: Path, tmp_path: Path
) -> None:
    encoder = load_encoder(str(tiny_sae))
    basis = build_basis(encoder.W_dec, torch.arange(4), torch.ones(4))
    Subspace(
        basis, encoder.hook_point, {"coherence": 0.0, "hook_point": str(encoder.hook_point)}
    ).save(tmp_path / "subspace")
    spec = AdapterSpec(kind="subspace", subspaces=(str(tmp_path / "subspace"),), mode="core")
    finetuning = Finetuning(str(tiny_lm), spec, recipe(), material(rows), tmp_path / "run")
    list(finetuning.steps())
    finetuning.save(tmp_path / "expert")
    assert all(one.any() for one in weights(tmp_path / "expert").values())
    model = PeftModel.from_pretrained(base_of(tiny_lm), str(tmp_path / "expert")).eval()
    found = row_losses(model, finetuning.material.held_out, micro_rows=2, pad=0)  # pyright: ignore[reportArgumentType]
    before, after = finetuning.looks[0].held_out, finetuning.best.held_out
    assert [row.nats for row in found] == pytest.approx([row.nats for row in after], rel=1e-4)
    assert [row.nats for row in found] != pytest.approx([row.nats for row in before], rel=1e-3)


@pytest.mark.parametrize("where", ["non_bos", "completion"])
def test_latents_can_change_at_some_positions_alone(
    rows: list[Example], tiny_lm: Path, tiny_sae: Path, tmp_path: Path, where: Any
) -> None:
    spec = AdapterSpec(kind="steering", sae=(str(tiny_sae),), positions=where)
    given = material(rows[:20], retain=rows[20:24])
    settings = recipe(retain_weight=0.1)
    finetuning = Finetuning(str(tiny_lm), spec, settings, given, tmp_path / "run")
    first, *_, last = losses(list(finetuning.steps()))
    assert first != last
    assert finetuning.best.held_out != finetuning.looks[0].held_out


def test_steps_are_counted_over_packed_rows(
    rows: list[Example], tiny_lm: Path, tmp_path: Path
) -> None:
    short = [row for row in rows if len(row.ids) < 100][:12]
    settings = recipe(batch_rows=1, micro_rows=1, max_steps=None, num_epochs=2, packing=True)
    packed = Material(short, rows[:4], [], max_tokens=6 * 100)
    finetuning = Finetuning(str(tiny_lm), LORA, settings, packed, tmp_path / "a")
    assert finetuning.total < 2 * len(short)
    assert sum("loss" in step.figures for step in finetuning.steps()) == finetuning.total
    with pytest.raises(ConfigError, match="rows to train on once packed"):
        Finetuning(str(tiny_lm), LORA, recipe(packing=True, batch_rows=12), packed, tmp_path / "b")


def test_a_step_has_the_same_rows_where_an_epoch_ends_within_it() -> None:
    dataset = Dataset.from_list([{"n": i} for i in range(10)])
    line = in_order(dataset, 24, seed=0)["n"]
    assert sorted(line[:10]) == sorted(line[10:20]) == list(range(10))
    assert line[:10] != line[10:20]
    assert in_order(dataset, 8, seed=0)["n"] == line[:8]
    assert in_order(dataset, 24, seed=1)["n"] != line


def test_the_best_step_is_chosen_by_one_half_and_judged_by_the_other() -> None:
    look = Look(0, [RowLoss(nats, 1) for nats in (1.0, 10.0, 2.0, 20.0, 3.0)], [])
    chooses, judges = look.halves("sft")
    assert [row.nats for row in chooses.held_out] == [1.0, 2.0, 3.0]
    assert [row.nats for row in judges.held_out] == [10.0, 20.0]
    pairs = Look(0, [RowLoss(float(i), 1) for i in range(8)], [])
    assert [[r.nats for r in half.held_out] for half in pairs.halves("dpo")] == [
        [0.0, 1.0, 4.0, 5.0],
        [2.0, 3.0, 6.0, 7.0],
    ]


def test_an_adapter_of_another_kind_is_not_gone_on_from(
    rows: list[Example], tiny_lm: Path, tiny_sae: Path, tmp_path: Path
) -> None:
    spec = AdapterSpec(kind="steering", sae=(str(tiny_sae),))
    first = Finetuning(str(tiny_lm), spec, recipe(max_steps=1), material(rows), tmp_path / "a")
    list(first.steps())
    first.save(tmp_path / "expert")
    with pytest.raises(ModelError, match="which holds steering: say --adapter steering"):
        Finetuning(
            str(tiny_lm),
            LORA,
            recipe(),
            material(rows),
            tmp_path / "b",
            start_from=tmp_path / "expert",
        )


def test_a_model_that_lacks_a_weight_is_refused(tiny_lm: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_lm, tmp_path / "lm")
    tensors = load_file(tmp_path / "lm/model.safetensors")
    name = next(name for name in tensors if name.endswith("down_proj.weight"))
    del tensors[name]
    save_file(tensors, tmp_path / "lm/model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=f"lacks 1 of the weights .* {name}"):
        load_causal(str(tmp_path / "lm"), "float32")
