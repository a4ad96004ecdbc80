"""The job: from a model to SAEs that sae-lens loads, a page, and a killed run that goes on."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from jobs import train_sae
from sae_ray.artifacts import content_hash, open_artifact, verify
from sae_ray.config import run_job
from sae_ray.distributed.saes import KIND
from sae_ray.sae.encoder import LatentEncoder

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore:The 'utils' module has been deprecated:DeprecationWarning"),
]
JOB = Path(train_sae.__file__)


def run(*flags: str) -> int:
    return run_job(train_sae.main, train_sae.Config, flags)


@pytest.fixture
def line(tmp_path: Path, tiny_lm: Path, make_pool) -> list[str]:
    pool = make_pool(tmp_path / "pool.jsonl", 200)
    with pool.open("a") as file:
        file.write("{broken\n")
    return [
        f"--lm={tiny_lm}",
        f"--data={pool}",
        "--hook_points=blocks.1.hook_resid_post,blocks.0.attn.hook_z",
        "--archs=topk,standard",
        "--widths=48",
        "--k=4",
        "--num_tokens=6400",
        "--batch_tokens=64",
        "--buffer_batches=4",
        "--rows_per_shard=32",
        "--held_out_share=0.2",
        "--checkpoint_every=10",
        "--max_tokens=40",
    ]


def test_a_grid_becomes_folders_that_sae_lens_loads(line, tmp_path: Path, capsys) -> None:
    from sae_lens import SAE  # noqa: PLC0415

    out = tmp_path / "out"
    flags = [*line, f"--out={out}", "--label_conversations=100", "--trackers=tensorboard"]
    assert run(*flags) == 0
    said = capsys.readouterr().out
    assert "4 SAEs trained on 6,400 tokens; 1 of 201 rows rejected" in said
    verify(str(out))
    manifest = open_artifact(str(out), KIND)
    assert manifest.extra["cut_instances"] > 0  # type: ignore[operator]
    assert pq.read_table(out / "rejected.parquet").to_pylist()[0]["reason"] == "not valid JSON"
    folders = sorted(path for path in out.iterdir() if path.is_dir())
    assert len(folders) == 4
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    for folder in folders:
        sae, ours = SAE.load_from_disk(folder), LatentEncoder.load(folder)
        assert sae.cfg.metadata.regime == "fast"
        theirs = sae.encode(x.view(5, 4, 8) if "hook_z" in folder.name else x)
        torch.testing.assert_close(ours.encode(x), theirs, atol=1e-4, rtol=1e-4)
        quality = json.loads((folder / "quality.json").read_text())
        assert 0 < quality["fvu"] < 2
        assert {"all", "special", "role", "position 0"} <= quality["parts"].keys()
        assert quality["recovered"]["kl_recovered"] <= 1
        assert (folder / "labels" / "labels.json").exists()
    page = (out / "report.html").read_text()
    assert "<script" not in page
    assert page.count("<polyline") == 4 * 5
    assert not re.search(r"(src|href)=", page)
    assert all(folder.name in page for folder in folders)
    assert list((tmp_path / "out-tensorboard").glob("events*"))
    # A finished folder costs nothing.
    started = time.monotonic()
    assert run(*flags) == 0
    assert time.monotonic() - started < 30
    assert run(*[*line, "--k=5", f"--out={out}"]) == 2
    assert "k: 4.0 there, 5.0 here" in capsys.readouterr().err


def test_a_killed_run_ends_at_the_weights_of_an_unbroken_one(line, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run(*line, f"--out={whole}") == 0
    command = [sys.executable, str(JOB), *line, f"--out={broken}"]
    process = subprocess.Popen(command, cwd=JOB.parents[1], stderr=subprocess.DEVNULL)
    while not (broken / ".checkpoint.pt").exists():
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (broken / "manifest.json").exists()
    assert run(*line, f"--out={broken}") == 0
    for file in whole.glob("*/sae_weights.safetensors"):
        theirs = load_file(broken / file.relative_to(whole))
        assert all(torch.equal(value, theirs[name]) for name, value in load_file(file).items())
    assert content_hash(str(whole), KIND) == content_hash(str(broken), KIND)


def test_without_flags_it_trains_for_the_embedded_model(tmp_path: Path, capsys) -> None:
    config = JOB.parent / "configs/smoke/train_sae.yaml"
    small = ["--num_tokens=8192", "--no-splice", "--eval_conversations=20"]
    assert run(f"--config={config}", *small, f"--out={tmp_path / 'out'}") == 0
    assert "2 SAEs trained on 8,192 tokens; 0 of " in capsys.readouterr().out
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("which answers most to <code") >= 2  # of either SAE
    assert page.count("<td>a random direction</td>") >= 2 * 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--hook_points=blocks.7.hook_resid_post"], "layers 0 to"),
        (["--archs=topk", "--widths=8", "--k=9"], "k=9 of d_sae=8"),
        (["--max_tokens=100000"], "positions: give at most that"),
        (["--lm=nowhere"], "--data"),
        (["--regime=bt_p", "--steer_prompts=2"], "--steer_prompts needs conversations"),
    ],
)
def test_bad_inputs_are_one_line(flags, message, tmp_path: Path, capsys) -> None:
    assert run(*flags, f"--out={tmp_path / 'out'}") == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
