"""The same line behind `ray job submit`, on a running cluster with token authentication."""

import secrets
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sae_ray.artifacts import content_hash
from sae_ray.curate.index import KIND
from sae_ray.curate.settings import IndexSettings
from sae_ray.distributed.data import build_index
from tests.head import DEADLINE_S, RAY, head_node

ROOT = Path(__file__).parent.parent.parent

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture
def head(tmp_path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """A head node: its dashboard's URL, and the environment of one who may use it."""
    with head_node(tmp_path, {}) as (url, allowed, _):
        yield url, allowed


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
