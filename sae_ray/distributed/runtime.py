"""Joining a Ray cluster, or starting one on this machine, and how many workers it can carry."""

import contextlib
import dataclasses
import logging
import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

import ray
from fsspec.implementations.local import LocalFileSystem
from joblib import cpu_count  # heeds affinity and control groups, as os.cpu_count does not
from ray.data import DataContext
from ray.exceptions import AuthenticationError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from sae_ray.artifacts import locate
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
    memory_bytes: int = 0
    """Of the machine's memory, for each; 0 where it is not known."""


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
            num_cpus=max(_MIN_LOGICAL_CPUS, cpu_count()),
            include_dashboard=False,
            object_store_memory=_OBJECT_STORE_BYTES,
            logging_level=logging.ERROR,
            log_to_driver=False,
        )
    else:
        _join(address)
    _keep_token_private()
    context = DataContext.get_current()
    context.enable_progress_bars = False
    # Ray ends what has not moved for half an hour; a large model takes longer for a shard on a CPU.
    context.execution_no_progress_timeout_s = -1
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


def plan_workers(num_workers: int | None, memory_bytes: int = 0) -> Workers:
    """Give each worker a GPU where there are any, else a core; no more than memory holds.

    Args:
        num_workers: how many; as many as there is room for, if not given.
        memory_bytes: what each takes of its machine's memory.

    Raises:
        ConfigError: memory does not hold so many, or not one.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    unit = "GPU" if any(node.get("GPU") for node in nodes) else "CPU"
    places = [int(node.get(unit, 0)) for node in nodes]
    if unit == "CPU" and len(nodes) == 1:
        # On this machine Ray is told of more CPUs than there are cores; count those.
        places = [min(places[0], cpu_count())]
    fit = [
        int(node.get("memory", 0) // memory_bytes) if memory_bytes else n
        for node, n in zip(nodes, places, strict=True)
    ]
    count = num_workers or max(1, sum(map(min, places, fit)))
    if memory_bytes and count > sum(fit):
        most = max(node.get("memory", 0) for node in nodes)
        raise ConfigError(
            f"{count} workers of {memory_bytes / 2**30:.1f} GiB are asked for and memory holds "
            f"{sum(fit)} (the machine with the most has {most / 2**30:.1f} GiB to give): give "
            "--num_workers as many, or take machines with more memory or a smaller model"
        )
    return Workers(count, num_cpus=1, num_gpus=int(unit == "GPU"), memory_bytes=memory_bytes)


def require_shared(paths: Sequence[str]) -> None:
    """Refuse local paths that some machine of the cluster does not see, before any work.

    Raises:
        ConfigError: a path is not there on one of them.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    local = [path for path in paths if isinstance(locate(path)[0], LocalFileSystem)]
    if len(nodes) < 2 or not local:
        return
    look = ray.remote(num_cpus=0, max_retries=1)(unseen_paths)
    asked = [
        look.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(local)
        for node in nodes
    ]
    for node, unseen in zip(nodes, ray.get(asked), strict=True):
        if unseen:
            raise ConfigError(
                f"{unseen[0]} is not there on {node['NodeManagerAddress']}, one of the cluster's "
                f"{len(nodes)} machines: put it in a folder that all of them share, or on a store "
                "that all reach (s3://...)"
            )


def unseen_paths(paths: Sequence[str]) -> list[str]:
    """Return which local paths are not there on this machine."""
    return [path for path in paths if not Path(locate(path)[1]).exists()]
