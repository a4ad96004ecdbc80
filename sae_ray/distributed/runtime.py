"""Joining a Ray cluster, or starting one on this machine, and how many workers it can carry."""

import contextlib
import dataclasses
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import ray
from ray.data import DataContext
from ray.exceptions import AuthenticationError

from sae_ray.errors import ConfigError

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
    num_cpus: int
    num_gpus: int


@contextlib.contextmanager
def cluster() -> Iterator[None]:
    """Join the cluster of RAY_ADDRESS (set inside Ray jobs), or start and stop one here."""
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
            logging_level=logging.ERROR,
            log_to_driver=False,
        )
    else:
        _join(address)
    _keep_token_private()
    DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()


def _join(address: str) -> None:
    require_listener(address)
    try:
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    except (ConnectionError, AuthenticationError) as error:
        # Of a wrong token, Ray says on stderr alone that it is one.
        raise ConfigError(
            f"the Ray cluster at RAY_ADDRESS={address} does not let this process in "
            f"({str(error).splitlines()[0]}): set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to "
            "the file with that cluster's token, or unset RAY_ADDRESS to run on this machine"
        ) from error


def require_listener(address: str) -> None:
    """Refuse an address at which nobody listens, which Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    if not port.isdecimal() or "/" in host:
        return  # `auto`, or Ray Client's address
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as error:
        raise ConfigError(
            f"no Ray cluster answers at RAY_ADDRESS={address} ({error}): start one with `ray start "
            "--head`, or unset RAY_ADDRESS to run on this machine"
        ) from error


def _keep_token_private() -> None:
    """Ray's token, on by default, lies in a file that Ray makes readable by all."""
    token = Path.home() / ".ray" / "auth_token"
    if token.is_file():
        token.chmod(0o600)


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
