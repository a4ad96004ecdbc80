import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from sae_ray.distributed.runtime import plan_workers, require_listener, unseen_paths
from sae_ray.errors import ConfigError

GIB = 2**30


def test_an_address_at_which_nobody_listens_is_refused_at_once() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"no Ray cluster answers at RAY_ADDRESS={address}"):
            require_listener(address)
        probe.listen()
        require_listener(address)
    for elsewhere in ("auto", "ray://127.0.0.1:1"):
        require_listener(elsewhere)


def test_there_are_no_more_workers_than_memory_holds(ray_cluster: None) -> None:
    import ray  # noqa: PLC0415 - the fixture has loaded it

    memory = ray.cluster_resources()["memory"]
    assert plan_workers(None, int(memory)).count == 1
    assert plan_workers(3, int(memory / 3.5)).count == 3
    assert plan_workers(3).count == 3
    with pytest.raises(ConfigError, match=r"4 workers of .* GiB are asked for and memory holds 3"):
        plan_workers(4, int(memory / 3.5))
    with pytest.raises(ConfigError, match=r"1 workers of .* memory holds 0 .* a smaller model"):
        plan_workers(None, int(memory) + GIB)


ON_ONE_CORE = """
import os
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
from sae_ray.distributed.runtime import cluster, plan_workers
with cluster():
    print(plan_workers(None).count)
"""


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system pins no processes")
def test_there_are_as_many_workers_as_cores_that_this_process_may_use() -> None:
    command = [sys.executable, "-c", ON_ONE_CORE]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1"]


def test_a_machine_says_which_local_paths_it_does_not_see(tmp_path: Path) -> None:
    # Asked of every machine where there are several; tests/faults runs two that see the same.
    seen, unseen = tmp_path / "seen.jsonl", tmp_path / "unseen.jsonl"
    seen.touch()
    assert unseen_paths([str(seen), f"file://{seen}", str(unseen)]) == [str(unseen)]
