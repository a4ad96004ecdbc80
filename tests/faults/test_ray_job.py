"""The same line behind `ray job submit`, on a running cluster with token authentication."""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from sae_ray.artifacts import content_hash
from sae_ray.curate.index import KIND
from sae_ray.curate.settings import IndexSettings
from sae_ray.distributed.data import build_index

ROOT = Path(__file__).parent.parent.parent
RAY = Path(sys.executable).parent / "ray"
DEADLINE_S = 200

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def answers(url: str) -> bool:
    try:
        urllib.request.urlopen(f"{url}/api/version", timeout=2)
    except urllib.error.HTTPError:
        return True  # it wants a token
    except OSError:
        return False
    return True


@pytest.fixture
def head(tmp_path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """A head node on loopback: its dashboard's URL, and the environment of one who may use it."""
    token = tmp_path / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    allowed = {
        **os.environ,
        "PATH": path,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
    }
    # Ray: sockets live in this folder, and their paths may have about 100 characters.
    folder = Path("/tmp") / f"sr-{uuid.uuid4().hex[:8]}"
    url = f"http://127.0.0.1:{(port := free_port())}"
    line = [
        *(str(RAY), "start", "--head", "--block", "--node-ip-address=127.0.0.1"),
        *(f"--port={free_port()}", "--dashboard-host=127.0.0.1", f"--dashboard-port={port}"),
        *("--num-cpus=4", "--object-store-memory=200000000", f"--temp-dir={folder}"),
    ]
    log = tmp_path / "head.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            line, env=allowed, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    deadline = time.monotonic() + DEADLINE_S
    while not answers(url):
        assert process.poll() is None, log.read_text()[-2000:]
        assert time.monotonic() < deadline
        time.sleep(0.5)
    yield url, allowed
    started = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    process.terminate()
    _, alive = psutil.wait_procs(started, timeout=20)
    for one in alive:
        one.kill()
    process.wait()
    shutil.rmtree(folder, ignore_errors=True)


def submit(line: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Submit a job, again while Ray has not yet started what takes jobs."""
    deadline = time.monotonic() + DEADLINE_S
    while True:
        done = subprocess.run(line, env=env, capture_output=True, text=True, timeout=DEADLINE_S)
        is_early = "No available agent to submit job" in done.stdout + done.stderr
        if not is_early or time.monotonic() > deadline:
            return done
        time.sleep(1)


def test_a_submitted_job_gives_the_same_bytes_and_strangers_may_not_submit(
    tiny_settings: IndexSettings, tmp_path: Path, head: tuple[str, dict[str, str]]
) -> None:
    url, allowed = head
    here, there = str(tmp_path / "here"), tmp_path / "there"
    list(build_index(tiny_settings, here))
    flags = tiny_settings.model_dump(exclude={"keep_columns", "check_fit", "num_workers"})
    line = [str(RAY), "job", "submit", f"--address={url}", f"--working-dir={ROOT}", "--"]
    line += ["python", "jobs/index.py", "--no-check_fit", "--num_workers=2"]
    line += [f"--{name}={value}" for name, value in flags.items()]

    wrong = tmp_path / "wrong"
    wrong.write_text(secrets.token_hex(32))
    stranger = {**allowed, "RAY_AUTH_TOKEN_PATH": str(wrong)}
    refused = subprocess.run(
        [*line, f"--out={there}"], env=stranger, capture_output=True, timeout=DEADLINE_S
    )
    assert refused.returncode != 0
    assert not there.exists()

    relative = submit([*line, "--out=relative"], allowed)
    assert relative.returncode != 0
    assert "give an absolute path" in relative.stdout + relative.stderr

    submitted = submit([*line, f"--out={there}"], allowed)
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    assert content_hash(str(there), KIND) == content_hash(here, KIND)
