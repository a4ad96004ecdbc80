"""Joining a Ray cluster, or starting one on this machine, and how many workers it can carry."""

import contextlib
import dataclasses
import logging
import os
from collections.abc import Iterator

import ray
from ray.data import DataContext

from sae_ray.errors import ConfigError, SaeRayError

_OBJECT_STORE_BYTES = 256 << 20
"""Enough on one machine: what travels between workers is slices and counts, never activations."""
_MIN_LOGICAL_CPUS = 4
"""Ray Data's own tasks and the workers must be placeable together, also on two cores."""

# glibc gives large blocks back to the system at once and pays for their pages again: with these,
# small matrix products on CPUs run up to several times faster.
WORKER_ENV = {"MALLOC_MMAP_THRESHOLD_": "33554432", "MALLOC_TRIM_THRESHOLD_": "4294967296"}


@dataclasses.dataclass(frozen=True)
class Workers:
    """How many workers, and what each takes."""

    count: int
    num_cpus: float
    num_gpus: float


@contextlib.contextmanager
def cluster() -> Iterator[None]:
    """Join the cluster of RAY_ADDRESS (set inside Ray jobs), or start one here and stop it after."""
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS") or "local"
    if address == "local":
        ray.init(
            address="local",
            num_cpus=max(_MIN_LOGICAL_CPUS, os.cpu_count() or 1),
            include_dashboard=False,
            object_store_memory=_OBJECT_STORE_BYTES,
            logging_level=logging.WARNING,
            log_to_driver=False,
        )
    else:
        try:
            ray.init(address=address, logging_level=logging.WARNING, log_to_driver=False)
        except ConnectionError as error:
            raise ConfigError(
                f"no Ray cluster answers at RAY_ADDRESS={address}: start one with `ray start "
                "--head`, or unset RAY_ADDRESS to run on this machine"
            ) from error
    context = DataContext.get_current()
    context.enable_progress_bars = False
    try:
        yield
    finally:
        ray.shutdown()


def plan_workers(num_workers: int | None) -> Workers:
    """Give each worker a GPU where there are any, else a core."""
    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    if gpus:
        return Workers(num_workers or gpus, num_cpus=1, num_gpus=1)
    if num_workers is None:
        # On this machine Ray is told of more CPUs than there are cores; count those.
        nodes = [node for node in ray.nodes() if node["Alive"]]
        cores = int(resources.get("CPU", 1))
        num_workers = min(cores, os.cpu_count() or 1) if len(nodes) == 1 else cores
    return Workers(max(1, num_workers), num_cpus=1, num_gpus=0)


def user_error(error: BaseException) -> SaeRayError | None:
    """Find the error that a user can put right under those that Ray wraps it in."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, SaeRayError):
            return seen
        seen = getattr(seen, "cause", None) or seen.__cause__
    return None
