import os
import subprocess
import sys

import joblib
import pytest

COUNTED = """
import threading, torch
from sae_ray.threads import use_cores
before = torch.get_num_threads()
use_cores({num})
found = [torch.get_num_threads()]
thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
thread.start()
thread.join()
print(before, *found)
"""


@pytest.mark.parametrize("num", [None, 2])
def test_cores_are_used_whatever_ray_sets_in_its_workers(num: int | None) -> None:
    """In a process of its own: how many threads there are is set once."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", COUNTED.format(num=num)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    # In the threads that are started afterwards, too: those are the ones that compute.
    assert [int(one) for one in done.stdout.split()] == [1, *[num or joblib.cpu_count()] * 2]
