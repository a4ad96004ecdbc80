"""A training that loses a worker, or its driver, ends at the weights of an unbroken one."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent.parent
DEADLINE_S = 400

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.soak, pytest.mark.timeout(1500)]


def command(pool: Path, lm: Path, out: Path) -> list[str]:
    line = [sys.executable, str(ROOT / "jobs/finetune.py"), f"--data={pool}", f"--lm={lm}"]
    line += ["--num_workers=2", "--zero_stage=2", "--max_steps=40", "--evaluate_every=4"]
    line += ["--batch_rows=4", "--held_out_rows=6", "--general_rows=0", "--learning_rate=0.01"]
    return [*line, "--patience=100", f"--out={out}"]


def start(line: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )


def num_checkpoints(out: Path) -> int:
    """Count checkpoints that were reported, the latest by name."""
    names = sorted(path.name for path in out.glob(".run/*/checkpoint_*"))
    return len(names)


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert process.poll() is None, "the run ended before it could be disturbed"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter/adapter_model.safetensors")


@pytest.mark.parametrize("who", ["worker", "driver"])
def test_killed_in_mid_step(tiny_pool: Path, tiny_lm: Path, tmp_path: Path, who: str) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    line = command(tiny_pool, tiny_lm, whole)
    subprocess.run(line, check=True, capture_output=True, timeout=DEADLINE_S)
    line = command(tiny_pool, tiny_lm, broken)
    process = start(line)
    wait_until(lambda: num_checkpoints(broken) >= 2, process)
    if who == "worker":
        family = psutil.Process(process.pid).children(recursive=True)
        workers = [one for one in family if "RayTrainWorker" in " ".join(one.cmdline())]
        assert len(workers) == 2
        workers[1].kill()
        assert process.wait(timeout=DEADLINE_S) == 0
    else:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert not (broken / "manifest.json").exists()
        subprocess.run(line, check=True, capture_output=True, timeout=DEADLINE_S)
    expected, found = weights(whole), weights(broken)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert (whole / "curves.jsonl").read_text() == (broken / "curves.jsonl").read_text()
