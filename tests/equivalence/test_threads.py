"""What is selected does not depend on how many threads the machine would give."""

import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from sae_ray import tiny

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
def test_one_thread_and_two_select_the_same_bytes(tmp_path: Path) -> None:
    # The embedded model: in smaller ones, products are too small to be shared between threads.
    pq.write_table(pq.read_table(tiny.pool_path()).slice(0, 400), tmp_path / "pool.parquet")
    line = [sys.executable, str(ROOT / "jobs/curate.py"), f"--pool={tmp_path}/pool.parquet"]
    line += ["--task=Put numbers in order from small to large", "--budget_examples=100"]
    line += ["--dtype=float32", "--num_workers=0"]
    selections = []
    for num_threads in ("1", "2"):
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        environment = {**os.environ, **dict.fromkeys(names, num_threads), "PYTHONPATH": str(ROOT)}
        out = tmp_path / num_threads
        subprocess.run(
            [*line, f"--out={out}"], env=environment, check=True, capture_output=True, timeout=100
        )
        selections.append((out / "selection.parquet").read_bytes())
    assert selections[0] == selections[1]
