"""Memory that a process keeps: glibc gives large blocks back at once and pays for them again."""

import contextlib
import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
"""Of malloc.h."""


def keep_large_blocks() -> None:
    """Let this process keep blocks up to 32 MB, of threads that start from now on too.

    Every thread has an arena of its own otherwise, which maps and unmaps large blocks whatever the
    thresholds are: a training in a thread took up to twice as long. Where there is no glibc,
    nothing happens. For processes that are yet to start, the environment says the same
    (`sae_ray.distributed.runtime.WORKER_ENV`).
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_ARENA_MAX, 1)
        mallopt(_MMAP_THRESHOLD, 32 << 20)
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)
