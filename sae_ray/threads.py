"""Threads: all of a machine's cores, or one where sums must not depend on how many share them."""

import contextlib
from collections.abc import Iterator

import torch
from joblib import cpu_count  # heeds affinity and control groups, as os.cpu_count does not
from threadpoolctl import threadpool_limits


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Run torch's and numpy's products on one thread, whatever OMP_NUM_THREADS says."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(before)


def use_cores(num: int | None) -> None:
    """Let torch compute on so many cores, by default all that this process may use.

    OMP_NUM_THREADS is not heeded: Ray sets it in its workers to the CPUs that they take (1), which
    say what is placed beside what, not what computing is worth. Call it before the first product:
    threads that have computed already keep their number.
    """
    torch.set_num_threads(num or cpu_count())
