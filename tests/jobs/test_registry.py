import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from jobs import registry
from sae_ray.config import run_job
from sae_ray.experts.card import ExpertCard, Measure
from sae_ray.experts.files import record_files


def write_expert(folder: Path, low: float) -> Path:
    adapter = folder / "adapter"
    adapter.mkdir(parents=True)
    save_file({"lora_A": torch.ones(2, 3)}, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    figure = Measure(name="loss", base=2, expert=1.5, gain=0.5, low=low, high=0.6, num_rows=40)
    card = ExpertCard(
        name="maths",
        description="Solve [bold]sums[/bold]",
        adapter="lora",
        objective="sft",
        base="tiny",
        base_sha256="b" * 64,
        files=record_files(str(adapter)),
        num_parameters=6,
        share=0.01,
        measures=[figure],
    )
    (folder / "card.json").write_bytes(card.encode())
    return folder


def test_the_actions_of_the_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = f"--registry={tmp_path / 'experts'}"
    weak = write_expert(tmp_path / "weak", low=-0.1)

    def run(line: str) -> int:
        words = registry.arguments([*line.split(), place])
        return run_job(registry.main, registry.Config, words)

    assert run(f"register --folder={weak}") == 0
    assert "candidate" in capsys.readouterr().out
    assert run("activate --expert=maths") == 2
    assert "does not beat its base" in capsys.readouterr().err
    assert run("activate --expert=maths --force_reason=demonstration") == 0
    assert "activate by force: demonstration" in capsys.readouterr().out
    assert run("list") == 0
    assert "maths@1" in capsys.readouterr().out
    assert run("retire --expert=maths@1 --reason=old") == 0
    assert run("show --expert=maths@1") == 0
    shown = capsys.readouterr().out
    assert "retire: old" in shown
    assert "[bold]sums[/bold]" in shown
    assert run("show") == 2
    assert "--expert is missing" in capsys.readouterr().err
    (weights,) = (tmp_path / "experts").rglob("*.safetensors")
    weights.write_bytes(b"")
    assert run("show --expert=maths@1") == 2
    assert "is not what its card says" in capsys.readouterr().err
