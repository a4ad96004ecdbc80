import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from jobs import fit_router
from sae_ray import tiny
from sae_ray.artifacts import Source
from sae_ray.config import run_job
from sae_ray.curate.sources import fingerprint
from sae_ray.experts.card import ExpertCard
from sae_ray.experts.files import record_files
from sae_ray.experts.registry import ExpertRegistry
from sae_ray.experts.router import Router

NUM_ROWS = 60


def run(*words: str) -> int:
    return run_job(fit_router.main, fit_router.Config, list(words))


def write_rows(folder: Path, domain: str) -> Path:
    rows = pq.read_table(tiny.pool_path(), columns=["domain", "messages"]).to_pylist()
    chosen = [{"messages": row["messages"]} for row in rows if row["domain"] == domain][:NUM_ROWS]
    path = folder / f"{domain}.jsonl"
    path.write_text("\n".join(map(json.dumps, chosen)))
    return path


@pytest.fixture
def registry(tmp_path: Path) -> str:
    """Two experts in use and a candidate; no prototypes, but their rows are there."""
    place = ExpertRegistry(str(tmp_path / "experts"))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file({"lora_A": torch.ones(2, 3)}, adapter / "adapter_model.safetensors")
    for domain in ("velan", "order", "sums"):
        card = ExpertCard(
            name=domain,
            description=f"What [bold]{domain}[/bold] is about",
            adapter="lora",
            objective="sft",
            base="embedded",
            base_sha256=fingerprint("lm", "embedded"),
            files=record_files(str(adapter)),
            sources={"data": Source(name=str(write_rows(tmp_path, domain)))},
            num_parameters=6,
            share=0.01,
            measures=[],
        )
        expert = place.register(card, str(adapter))
        if domain != "sums":
            place.activate(expert.id, force_reason="a test")
    return place.path


def test_a_registry_becomes_a_router_that_tells_its_experts_apart(
    registry: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    talk, out = write_rows(tmp_path, "small_talk"), tmp_path / "router"
    line = [f"--registry={registry}", f"--out={out}", "--kind=zero_shot"]
    rows = [
        {"modelId": "tiny", "layer": "2-sae", "index": str(one), "description": f"so {one}"}
        for one in (1023, 7)
    ]
    labels = tmp_path / "batch-0.jsonl"
    labels.write_text("".join(json.dumps(row) + "\n" for row in rows))
    line.append(f"--labels={labels}")
    assert run(*line, f"--background={talk}", "--num_background=60") == 0
    shown = capsys.readouterr().out
    assert "a zero_shot router over 2 experts" in shown
    assert "What [bold]velan[/bold]" in shown
    router = Router.load(str(out))
    assert router.labels == {7: "so 7", 1023: "so 1023"}
    # Of what is nobody's a fifth was held out, which is what the figure is of.
    held = int(re.findall(r"of (\d+) stay", shown)[0])
    assert held == (len(router.background) + held) // 5 > 5
    ids = {one.card.name: one.id for one in ExpertRegistry(registry).active()}
    assert sorted(one.id for one in router.experts) == sorted(ids.values())
    for name, id in ids.items():
        rows = pq.read_table(tiny.pool_path(), columns=["domain", "messages"]).to_pylist()
        unseen = [row["messages"][:1] for row in rows if row["domain"] == name][NUM_ROWS:][:20]
        chosen = [route.expert_ids for route in router.route_many(unseen)]
        others = {one for one in ids.values() if one != id}
        assert chosen.count((id,)) >= 10, chosen
        assert not any(set(one) & others for one in chosen)
    # The same line again does nothing; another kind needs another folder.
    assert run(*line, f"--background={talk}", "--num_background=60") == 0
    assert run(*line[:2], "--kind=knn", f"--background={talk}", "--num_background=60") == 2
    assert "of another run" in capsys.readouterr().err


def test_without_a_background_the_embedded_pool_stands_in(
    registry: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "router"
    assert run(f"--registry={registry}", f"--out={out}", "--num_background=300") == 0
    assert "of 75 stay" in capsys.readouterr().out  # a quarter more than was fitted on
    router = Router.load(str(out))
    assert len(router.background) < 300  # what is like velan or order was set aside
    ids = {one.name: one.id for one in router.experts}
    messages = [{"role": "user", "content": "Line these up, lowest in front: 4, 2, 9"}]
    assert router.route(messages).expert_ids == (ids["order"],)


def test_labels_of_another_sae_are_refused_before_anything_is_read(
    registry: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = tmp_path / "batch-0.jsonl"
    row = {"modelId": "tiny", "layer": "2-sae", "index": "1024", "description": "x"}
    labels.write_text(json.dumps(row))
    line = [f"--registry={registry}", f"--out={tmp_path / 'router'}", f"--labels={labels}"]
    assert run(*line) == 2
    assert f"{labels}, line 1: index 1024, but" in capsys.readouterr().err
    assert not (tmp_path / "router").exists()


def test_a_registry_without_experts_in_use_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [f"--registry={tmp_path / 'none'}", f"--out={tmp_path / 'router'}"]
    for more in ([], ["--lm=embedded"], ["--lm=embedded", "--sae=embedded"]):
        assert run(*line, *more) == 2
        assert f"{tmp_path / 'none'} holds no expert in use" in capsys.readouterr().err
    assert not (tmp_path / "router").exists()


def test_a_model_of_ones_own_needs_a_background_of_ones_own(
    registry: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    tiny_lm_of: Callable[[str], Path],
) -> None:
    lm = tiny_lm_of("llama")
    line = [f"--registry={registry}", f"--out={tmp_path / 'router'}", f"--lm={lm}"]
    assert run(*line, "--sae=embedded") == 2
    said = capsys.readouterr().err
    assert "--background is missing" in said
    assert str(lm) in said
    # A copy of the embedded model is the embedded model.
    copy = shutil.copytree(tiny.lm_path(), tmp_path / "copy")
    line[2] = f"--lm={copy}"
    assert run(*line, "--sae=embedded", "--num_background=100") == 0
