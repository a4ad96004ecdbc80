"""Two workers on DeepSpeed give what one process gives, at every stage of ZeRO."""

import dataclasses
import itertools
import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from accelerate.state import AcceleratorState
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sae_ray.adapters.attach import AdapterSpec
from sae_ray.adapters.basis import build_basis
from sae_ray.adapters.edits import LATENT_KINDS
from sae_ray.adapters.examples import read_examples, read_pairs, split
from sae_ray.adapters.finetune import Material
from sae_ray.adapters.recipe import Recipe
from sae_ray.adapters.subspace import Subspace
from sae_ray.chat import ChatTokenizer
from sae_ray.distributed.finetune import Trained, Training, _finetuning, _join, train_expert
from sae_ray.distributed.gang import Gang, Tell, run_gang
from sae_ray.distributed.runtime import cluster, plan_workers
from sae_ray.sae.pretrained import load_encoder

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


def losses(curves: Sequence[dict[str, float]]) -> list[float]:
    return [row["loss"] for row in curves if "loss" in row]


# 33 rows in steps of 4: an epoch ends within the ninth.
OVER_AN_EPOCH = recipe(max_steps=11, evaluate_every=11)


@pytest.fixture
def alone(tiny_lm: Path, tmp_path: Path, sft: Material) -> tuple[Trained, str]:
    """A LoRA that one process trained, and where it lies."""
    training = Training(
        str(tiny_lm), AdapterSpec(kind="lora", r=2), OVER_AN_EPOCH, str(tmp_path / "alone")
    )
    return train(training, sft, 0), training.out


def require_same_weights(found: str, expected: str) -> None:
    one, other = (load_file(f"{path}/adapter_model.safetensors") for path in (found, expected))
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=1e-6, rtol=0)


def test_two_workers_equal_one_process(
    ray_cluster: None, tiny_lm: Path, tmp_path: Path, sft: Material, alone: tuple[Trained, str]
) -> None:
    expected, here = alone
    spec, out = AdapterSpec(kind="lora", r=2), str(tmp_path / "both")
    both = train(Training(str(tiny_lm), spec, OVER_AN_EPOCH, out, zero_stage=2), sft, 2)
    assert both.num_workers == 2
    assert losses(both.curves) == pytest.approx(losses(expected.curves), rel=1e-6)
    require_same_weights(f"{out}/adapter", f"{here}/adapter")
    for one, other in ((expected.before, both.before), (expected.after, both.after)):
        assert [r.nats for r in other.held_out] == pytest.approx([r.nats for r in one.held_out])
        assert [r.nats for r in other.general] == pytest.approx([r.nats for r in one.general])


def _each(config: dict[str, Any], tell: Tell) -> dict[str, list[float]]:
    """Train one after the other in the same workers, which take long to start."""
    found = {}
    for name, training in config["trainings"].items():
        AcceleratorState._reset_state(reset_partial_state=True)
        world = _join(training, config["workers"])
        with tempfile.TemporaryDirectory() as scratch:
            material = config["materials"][training.recipe.objective]
            finetuning = _finetuning(training, material, Path(scratch), world)
            for _ in finetuning.steps():
                pass
            if world.rank == 0:
                finetuning.save(Path(training.out))
            torch.distributed.barrier()
            found[name] = losses(finetuning.curves())
    return found


def trained_together(
    trainings: dict[str, Training], materials: dict[str, Material], folder: Path
) -> dict[str, list[float]]:
    """Return each training's losses, of one gang of two workers for all."""
    with cluster():
        config = {
            "trainings": trainings,
            "materials": materials,
            "workers": (workers := plan_workers(2)),
        }
        run = run_gang(_each, config, Gang(workers, str(folder), "each", max_failures=0))
        with pytest.raises(StopIteration) as done:
            next(run)
    found: dict[str, list[float]] = done.value.value
    assert found.keys() == trainings.keys()
    return found


def test_every_adapter_trains_by_either_objective_at_every_stage_on_two_workers(
    ray_cluster: None,
    tiny_lm: Path,
    tiny_sae: Path,
    tmp_path: Path,
    sft: Material,
    dpo: Material,
    alone: tuple[Trained, str],
) -> None:
    encoder = load_encoder(str(tiny_sae))
    latents = torch.arange(4)
    basis = build_basis(encoder.W_dec, latents, torch.ones(4))
    facts = {"coherence": basis.coherence, "hook_point": str(encoder.hook_point)}
    Subspace(basis, encoder.hook_point, facts).save(tmp_path / "subspace")
    specs: dict[str, AdapterSpec | None] = {
        "lora": AdapterSpec(kind="lora", r=2),
        "subspace": AdapterSpec(kind="subspace", subspaces=(str(tmp_path / "subspace"),)),
        **{kind: AdapterSpec(kind=kind, sae=(str(tiny_sae),)) for kind in LATENT_KINDS},
        "full": None,
    }
    trainings = {
        f"{kind} {objective}": Training(
            str(tiny_lm),
            spec,
            recipe(objective=objective, max_steps=2, learning_rate=1e-2),
            str(tmp_path / f"{kind}-{objective}"),
        )
        for kind, spec in specs.items()
        for objective in ("sft", "dpo")
    }
    at_3 = dataclasses.replace(trainings["subspace sft"], out=f"{tmp_path}/3", zero_stage=3)
    trainings["subspace sft at ZeRO-3"] = at_3
    expected, here = alone
    for stage in (0, 3):
        place = str(tmp_path / f"zero-{stage}")
        trainings[f"lora alike at ZeRO-{stage}"] = Training(
            str(tiny_lm), specs["lora"], OVER_AN_EPOCH, place, zero_stage=stage
        )
    for stage, start in itertools.product((0, 2, 3), (None, f"{here}/adapter")):
        name = f"lora at ZeRO-{stage}, {'fresh' if start is None else 'after sft'}, dpo"
        settings = recipe(objective="dpo", max_steps=2)
        trainings[name] = Training(
            str(tiny_lm), specs["lora"], settings, str(tmp_path / name), start, zero_stage=stage
        )
    found = trained_together(trainings, {"sft": sft, "dpo": dpo}, tmp_path / "run")
    for name, (first, second, *_) in found.items():
        assert second != first, name
        if name.endswith("dpo"):
            assert first == pytest.approx(math.log(2), abs=1e-6), name
            assert second < first, name
        if "alike" in name:
            assert found[name] == pytest.approx(losses(expected.curves), rel=1e-6), name
            require_same_weights(trainings[name].out, f"{here}/adapter")
    for name, training in trainings.items():
        weights = "model" if name.startswith("full") else "adapter_model"
        tensors = load_file(f"{training.out}/{weights}.safetensors")
        assert tensors, name
        assert all(tensor.isfinite().all() for tensor in tensors.values()), name
        if name.startswith(("lora", "subspace")):
            model = AutoModelForCausalLM.from_pretrained(tiny_lm)
            PeftModel.from_pretrained(model, training.out)
