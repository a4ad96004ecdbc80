"""Running: the service started and stopped, on this machine or the cluster that it joins."""

import contextlib
import ipaddress
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator

from ray import serve
from ray.serve.config import HTTPOptions

from sae_ray.config import run_job
from sae_ray.distributed.runtime import cluster
from sae_ray.errors import ConfigError
from sae_ray.experts.settings import ServeSettings
from serve.app import build

NAME = "moie"


@contextlib.contextmanager
def running(settings: ServeSettings) -> Iterator[str]:
    """Serve until the block is left; gives the URL of the page and, with /v1, of the API.

    Raises:
        ConfigError: it could be reached from elsewhere, and everyone might ask.
    """
    require_keys_beyond_loopback(settings.host, settings.keys)
    with cluster():
        # Serve gives up later than the service itself, which says so in OpenAI's words.
        until_s = settings.timeout_s + 30
        options = HTTPOptions(host=settings.host, port=settings.port, request_timeout_s=until_s)
        serve.start(http_options=options)
        try:
            serve.run(build(_absolute(settings)), name=NAME)
            yield f"http://{settings.host}:{settings.port}"
        finally:
            serve.shutdown()


def _absolute(settings: ServeSettings) -> ServeSettings:
    """Return settings whose local paths hold in every replica's working directory."""
    paths = settings.model_dump(include={"lm", "registry", "router", "sae", "keys"})
    local = {name: path for name, path in paths.items() if path and os.path.exists(path)}
    return settings.model_copy(update={n: os.path.abspath(path) for n, path in local.items()})


def require_keys_beyond_loopback(host: str, keys: str | None) -> None:
    """Refuse to be reached from elsewhere by everyone."""
    try:
        inside = ipaddress.ip_address(host).is_loopback
    except ValueError:
        inside = host == "localhost"
    if not inside and keys is None:
        raise ConfigError(
            f"--host {host} can be reached from other machines, and without --keys everyone may "
            "ask: make a key with python -m serve.keys FILE NAME, or stay on 127.0.0.1"
        )


def main(settings: ServeSettings) -> None:
    """Serve until told to stop."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    with running(settings) as url:
        sys.stdout.write(f"serving at {url}\n")
        sys.stdout.flush()
        stop.wait()


if __name__ == "__main__":
    sys.exit(run_job(main, ServeSettings))
