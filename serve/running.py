"""Running: the service started and stopped, on this machine or the cluster that it joins."""

import contextlib
import logging
import signal
import sys
import threading
from collections.abc import Iterator

from ray import serve
from ray.serve import Application
from ray.serve.config import HTTPOptions

from sae_ray.config import run_job
from sae_ray.distributed.runtime import cluster
from sae_ray.errors import ConfigError
from sae_ray.experts.settings import ServeSettings
from serve.app import build
from serve.hosts import require_address, running_at

NAME = "moie"


@contextlib.contextmanager
def running(settings: ServeSettings) -> Iterator[str]:
    """Serve until the block is left; gives the URL of the page and, with /v1, of the API.

    What others serve in the same cluster is left alone, also at the end.

    Raises:
        ConfigError: it could be reached from elsewhere, and everyone might ask; or Serve runs
            already in this cluster, at another address.
    """
    application = build(settings)
    with cluster():
        started_here = running_at() is None
        if started_here:
            # Serve gives up later than the service itself, which says so in OpenAI's words.
            until_s = settings.timeout_s + 30
            options = HTTPOptions(host=settings.host, port=settings.port, request_timeout_s=until_s)
            serve.start(proxy_location="HeadOnly", http_options=options)
        try:
            require_address(settings)
            with _deployed(application):
                yield "http://{}:{}".format(*running_at() or ())
        finally:
            if started_here and not serve.status().applications:
                serve.shutdown()


@contextlib.contextmanager
def _deployed(application: Application) -> Iterator[None]:
    """Serve an application while the block lasts.

    Raises:
        ConfigError: one of its name is served already.
    """
    if NAME in serve.status().applications:
        raise ConfigError(
            f"this cluster serves an application {NAME!r} already: update that with serve deploy, "
            "or unset RAY_ADDRESS to run on this machine alone"
        )
    try:
        serve.run(application, name=NAME)
        yield
    finally:
        # Of requests that take longer than this waits, Serve sees the end by itself.
        with contextlib.suppress(TimeoutError):
            serve.delete(NAME)


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
