"""Hosts: where Serve listens, and that beyond loopback nobody asks without a key."""

import ipaddress
from typing import NamedTuple

import ray
from ray.serve.context import _get_global_client

from sae_ray.errors import ConfigError
from sae_ray.experts.settings import ServeSettings


def is_loopback(host: str) -> bool:
    """Say whether an address to listen on can be reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def require_keys_beyond_loopback(host: str, keys: str | None) -> None:
    """Refuse to be reached from elsewhere by everyone.

    Raises:
        ConfigError: it could be.
    """
    if not is_loopback(host) and keys is None:
        raise ConfigError(
            f"host {host} can be reached from other machines, and without keys everyone may ask: "
            "make a key with python -m serve.keys FILE NAME and give --keys FILE, or stay on "
            "127.0.0.1"
        )


def require_address(settings: ServeSettings) -> None:
    """Refuse an address that is not that of the Serve which runs, or needs keys and has none.

    Raises:
        ConfigError: it is so.
    """
    require_keys_beyond_loopback(settings.host, settings.keys)
    at = running_at()
    if at is None:
        return
    require_keys_beyond_loopback(at.host, settings.keys)
    given = {name: getattr(settings, name) for name in {"host", "port"} & settings.model_fields_set}
    if given != {name: getattr(at, name) for name in given}:
        raise ConfigError(
            f"{', '.join(f'--{name} {value}' for name, value in sorted(given.items()))} was given "
            f"and Serve listens at {at.host}:{at.port} in this cluster already, which it keeps: "
            "leave host and port out, or unset RAY_ADDRESS to run on this machine alone"
        )


class Address(NamedTuple):
    """Where Serve listens."""

    host: str
    port: int


def running_at() -> Address | None:
    """Return where the Serve of the cluster that was joined listens, if one runs."""
    if not ray.is_initialized():
        return None
    # Ray 2.60 tells this nowhere else: serve.status() names no host.
    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return None
    # Serve: without an HTTP server of its own there is no host.
    return Address(client.http_config.host or "127.0.0.1", client.http_config.port)
