import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from sae_ray.distributed.runtime import plan_workers, require_listener
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


TWO_MACHINES = """
import sys
from pathlib import Path
from ray.cluster_utils import Cluster
import ray
from sae_ray.distributed.runtime import require_shared
from sae_ray.errors import ConfigError
head, other, seen, unseen = sys.argv[1:]
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "env_vars": {"HOME": head}})
cluster.add_node(num_cpus=1, env_vars={"HOME": other})
ray.init(address=cluster.address, log_to_driver=False)
require_shared(["s3://bucket/elsewhere", seen])
try:
    require_shared([seen, unseen])
except ConfigError as error:
    print(error)
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.ray
@pytest.mark.slow
def test_a_local_path_that_another_machine_does_not_see_is_refused(tmp_path: Path) -> None:
    # Two nodes whose home folders differ stand for two machines: ~ is another place on each.
    head, other = tmp_path / "head", tmp_path / "other"
    head.mkdir()
    other.mkdir()
    (head / "pool.jsonl").touch()
    seen = tmp_path / "seen.jsonl"
    seen.touch()
    command = [sys.executable, "-c", TWO_MACHINES, str(head), str(other), str(seen)]
    done = subprocess.run([*command, "~/pool.jsonl"], capture_output=True, text=True, check=True)
    assert "pool.jsonl is not there on" in done.stdout
    assert "one of the cluster's 2 machines" in done.stdout
