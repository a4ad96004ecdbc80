"""Two workers on DeepSpeed give what one process gives, at every stage of ZeRO."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sae_ray.adapters.attach import AdapterSpec
from sae_ray.adapters.examples import read_examples, read_pairs, split
from sae_ray.adapters.finetune import Material
from sae_ray.adapters.recipe import Recipe
from sae_ray.chat import ChatTokenizer
from sae_ray.distributed.finetune import Trained, Training, train_expert

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def recipe(**changes: Any) -> Recipe:
    settings = {
        "max_steps": 4,
        "batch_rows": 4,
        "micro_rows": 2,
        "evaluate_every": 2,
        # Adam turns a last bit of a small gradient into a share of the rate: 1e-6 of the weights
        # is a hundredth of one step.
        "learning_rate": 1e-4,
        "warmup_share": 0.0,
    }
    return Recipe(**(settings | changes))


@pytest.fixture
def sft(tiny_lm: Path, tiny_pool: Path) -> Material:
    """Conversations, of which an odd number is looked at."""
    tokenizer = ChatTokenizer.load(tiny_lm)
    rows = read_examples(str(tiny_pool), tokenizer, max_tokens=256).rows
    train, held_out = split(rows[:40], 7, seed=0)
    return Material(train, held_out, rows[40:45], max_tokens=256)


@pytest.fixture
def dpo(tiny_lm: Path, tmp_path: Path) -> Material:
    """Preference pairs."""
    path = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": f"Question {i}?", "chosen": f"Yes {i}.", "rejected": f"No, never {i}."}
        for i in range(24)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    pairs = read_pairs(str(path), ChatTokenizer.load(tiny_lm), max_tokens=128).rows
    return Material(*split(pairs, 5, seed=0), [], max_tokens=128)


def train(training: Training, material: Material, num_workers: int) -> Trained:
    steps = train_expert(training, material, num_workers=num_workers)
    while True:
        try:
            next(steps)
        except StopIteration as done:
            return done.value


def weights(out: str) -> dict[str, torch.Tensor]:
    return load_file(f"{out}/adapter/adapter_model.safetensors")


def losses(curves: Sequence[dict[str, float]]) -> list[float]:
    return [row["loss"] for row in curves if "loss" in row]


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_two_workers_equal_one_process(
    ray_cluster: None, tiny_lm: Path, tmp_path: Path, sft: Material, stage: int
) -> None:
    def run(name: str, num_workers: int) -> tuple[Trained, str]:
        out = str(tmp_path / name)
        spec = AdapterSpec(kind="lora", r=2)
        training = Training(str(tiny_lm), spec, recipe(), out, zero_stage=stage)
        return train(training, sft, num_workers), out

    alone, here = run("alone", 0)
    both, there = run("both", 2)
    assert both.num_workers == 2
    assert losses(both.curves) == pytest.approx(losses(alone.curves), abs=1e-6)
    expected, found = weights(here), weights(there)
    assert expected.keys() == found.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-6, rtol=0)
    for one, other in ((alone.before, both.before), (alone.after, both.after)):
        assert [r.nats for r in other.held_out] == pytest.approx([r.nats for r in one.held_out])
        assert [r.nats for r in other.general] == pytest.approx([r.nats for r in one.general])


@pytest.mark.parametrize(
    "stage", [0, *(pytest.param(stage, marks=pytest.mark.soak) for stage in (2, 3))]
)
def test_the_first_loss_of_dpo_is_ln_2_fresh_and_after_sft(
    ray_cluster: None, tiny_lm: Path, tmp_path: Path, sft: Material, dpo: Material, stage: int
) -> None:
    spec = AdapterSpec(kind="lora", r=2)
    first = Training(str(tiny_lm), spec, recipe(), str(tmp_path / "sft"))
    train(first, sft, 0)
    for start in (None, f"{first.out}/adapter"):
        out, settings = str(tmp_path / f"{start is None}"), recipe(objective="dpo", max_steps=2)
        training = Training(str(tiny_lm), spec, settings, out, start, zero_stage=stage)
        found = losses(train(training, dpo, 2).curves)
        assert found[0] == pytest.approx(math.log(2), abs=1e-6)
        assert found[1] < found[0]
