import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from jobs import finetune
from sae_ray import tiny
from sae_ray.artifacts import open_artifact, verify
from sae_ray.config import run_job
from sae_ray.distributed.expert import KIND
from sae_ray.experts.registry import ExpertRegistry

SMOKE = Path(__file__).parents[2] / "jobs" / "configs" / "smoke"
ADAPTERS = ("lora", "subspace", "steering", "scale", "affine", "residual", "full")


def run(*words: str) -> int:
    return run_job(finetune.main, finetune.Config, list(words))


@pytest.fixture(scope="module")
def sums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of one of the embedded pool's domains, and one that cannot be learnt from."""
    rows = pq.read_table(tiny.pool_path(), columns=["id", "domain", "messages"]).to_pylist()
    chosen = [row for row in rows if row["domain"] == "order"][:200]
    chosen.append({"id": "bad", "messages": [{"role": "user", "content": "Anybody there?"}]})
    path = tmp_path_factory.mktemp("data") / "order.jsonl"
    path.write_text("\n".join(map(json.dumps, chosen)))
    return path


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_rows_become_an_expert_that_is_measured_and_registered(
    sums: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    line = [f"--data={sums}", f"--out={out}", "--num_workers=0", "--name=order"]
    line += ["--num_epochs=3", "--learning_rate=0.005", "--held_out_rows=40", "--max_tokens=256"]
    line += ["--description=Put numbers in order", "--general_rows=8"]
    assert run(*line) == 0
    shown = capsys.readouterr().out
    assert "order@1 is active" in shown
    assert "160 rows (1 rejected)" in shown
    verify(str(out))
    (rejected,) = pq.read_table(out / "rejected.parquet").to_pylist()
    assert (rejected["row"], rejected["reason"]) == (200, "no assistant turn to learn from")
    expert = ExpertRegistry(f"{out}-registry").find("order")
    assert expert.card.description == "Put numbers in order"
    assert expert.card.measures[0].gain > 0.3
    folder = ExpertRegistry(f"{out}-registry").fetch("order", tmp_path / "fetched")
    base = AutoModelForCausalLM.from_pretrained(tiny.lm_path(), dtype=torch.float32)
    PeftModel.from_pretrained(base, str(folder))
    assert (out / "report.html").read_text().count("<polyline") >= 3
    held_out = pq.read_table(out / "held_out.parquet").to_pandas()
    assert len(held_out) == 40
    assert (held_out["reply_nats_expert"] < held_out["reply_nats_base"]).mean() > 0.8
    # The same line again does nothing; another setting needs another folder.
    before = open_artifact(str(out), KIND).created
    assert run(*line) == 0
    assert open_artifact(str(out), KIND).created == before
    capsys.readouterr()
    assert run(*line, "--seed=1") == 2
    assert "of another run (seed: 0 there, 1 here" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_expert_that_is_no_better_stays_a_candidate_and_that_is_no_failure(
    sums: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [f"--data={sums}", f"--out={tmp_path / 'out'}", "--num_workers=0", "--max_steps=1"]
    line += ["--learning_rate=1e-9", "--general_rows=0", "--max_tokens=256"]
    assert run(*line) == 0
    assert "expert@1 is candidate" in capsys.readouterr().out


def test_what_cannot_be_learnt_from_leaves_its_folder_free(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "pool.jsonl", tmp_path / "out"
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "word " * 800}]
    path.write_text("\n".join(json.dumps({"messages": chat, "id": i}) for i in range(20)))
    assert run(f"--data={path}", f"--out={out}", "--num_workers=0") == 2
    assert "reply longer than the context: 20" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("objective", ["sft", "dpo"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_smoke_configs_run_every_adapter_on_two_workers(
    ray_cluster: None, sums: Path, tmp_path: Path, adapter: str, objective: str
) -> None:
    out = tmp_path / "out"
    line = ["--config", str(SMOKE / f"finetune_{objective}.yaml"), f"--adapter={adapter}"]
    if adapter == "subspace":
        line += [f"--positive={sums}"]
    assert run(*line, f"--out={out}") == 0
    manifest = open_artifact(str(out), KIND)
    assert manifest.extra["num_workers"] == 2
    weights = "model" if adapter == "full" else "adapter_model"
    tensors = load_file(out / "adapter" / f"{weights}.safetensors")
    assert all(tensor.numel() for tensor in tensors.values())


def test_a_name_that_nobody_could_ask_for_is_refused_before_anything_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("base", "moie"):
        assert run(f"--name={name}", "--data=embedded", f"--out={tmp_path / 'out'}") == 2
        assert f"--name='{name}': a service calls its base" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
