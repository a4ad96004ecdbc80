"""An index that is killed, loses workers or loses a node ends as if nothing had happened."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from sae_ray.artifacts import content_hash
from sae_ray.curate.index import KIND, FeatureIndex
from sae_ray.curate.request import Request
from sae_ray.curate.settings import IndexSettings
from sae_ray.distributed.data import build_index
from sae_ray.explain.curation import Curator

ROOT = Path(__file__).parent.parent.parent
NUM_SHARDS = 60
DEADLINE_S = 400

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture
def settings(tiny_settings: IndexSettings) -> IndexSettings:
    """Settings that cut the tiny pool into a shard a row."""
    return tiny_settings.model_copy(update={"rows_per_shard": 1, "num_workers": 2})


def answer(index: Path) -> tuple[str, bytes]:
    """Return the content hash of an index and what is selected from it."""
    request = Request(task="Write songs for the piano", budget_examples=20)
    Curator(FeatureIndex(str(index))).curate(request, f"{index}-selection")
    selection = Path(f"{index}-selection/selection.parquet").read_bytes()
    return content_hash(str(index), KIND), selection


@pytest.fixture
def expected(settings: IndexSettings, tmp_path: Path) -> tuple[str, bytes]:
    """What an undisturbed run gives."""
    path = tmp_path / "expected"
    list(build_index(settings.model_copy(update={"num_workers": 0}), str(path)))
    return answer(path)


def command(settings: IndexSettings, out: Path) -> list[str]:
    flags = settings.model_dump(exclude={"keep_columns", "check_fit"})
    line = [sys.executable, str(ROOT / "jobs/index.py"), "--no-check_fit", "--out", str(out)]
    return line + [f"--{name}={value}" for name, value in flags.items()]


def start(line: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )


def num_parts(out: Path) -> int:
    return len(list(out.glob(".parts/*.json")))


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert process.poll() is None, "the run ended before it could be disturbed"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_killed_and_started_again(
    settings: IndexSettings, expected: tuple[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = start(command(settings, out))
    wait_until(lambda: num_parts(out) >= 5, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    there = num_parts(out)
    assert 5 <= there < NUM_SHARDS
    assert not (out / "manifest.json").exists()
    subprocess.run(command(settings, out), check=True, capture_output=True, timeout=DEADLINE_S)
    assert answer(out) == expected


def test_a_killed_worker_is_replaced(
    settings: IndexSettings, expected: tuple[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = start(command(settings, out))
    wait_until(lambda: num_parts(out) >= 3, process)
    workers = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if "ShardWriter" in " ".join(child.cmdline())
    ]
    assert workers
    workers[0].kill()
    assert process.wait(timeout=DEADLINE_S) == 0
    assert answer(out) == expected


TWO_NODES = """
import sys, threading, time
from pathlib import Path
from ray.cluster_utils import Cluster
from sae_ray.config import run_job
sys.path.insert(0, {root!r})
from jobs.index import Config, main
import os

head = {{"num_cpus": 1, "include_dashboard": False}}
cluster = Cluster(initialize_head=True, head_node_args=head)
second = cluster.add_node(num_cpus=2)
cluster.wait_for_nodes()
os.environ["RAY_ADDRESS"] = cluster.address
out, lose_node = Path(sys.argv[1]), sys.argv[2] == "lose"


def remove_when_half_done():
    while len(list(out.glob(".parts/*.json"))) < 5:
        time.sleep(0.02)
    cluster.remove_node(second, allow_graceful=False)
    cluster.add_node(num_cpus=2)


if lose_node:
    threading.Thread(target=remove_when_half_done, daemon=True).start()
code = run_job(main, Config, sys.argv[3:])
cluster.shutdown()
sys.exit(code)
"""


@pytest.mark.parametrize("what", ["lose", pytest.param("keep", marks=pytest.mark.soak)])
def test_two_nodes_give_the_same_bytes_even_when_one_is_lost(
    settings: IndexSettings, expected: tuple[str, bytes], tmp_path: Path, what: str
) -> None:
    out = tmp_path / "out"
    script = tmp_path / "two_nodes.py"
    script.write_text(TWO_NODES.format(root=str(ROOT)))
    line = [sys.executable, str(script), str(out), what, *command(settings, out)[2:]]
    subprocess.run(line, check=True, capture_output=True, timeout=DEADLINE_S)
    assert answer(out) == expected
