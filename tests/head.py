"""A head node of Ray in processes of its own, with token authentication, as on a real cluster."""

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil

from tests.service import free_port

RAY = Path(sys.executable).parent / "ray"
DEADLINE_S = 200


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(f"{url}/api/version", timeout=2)
    except urllib.error.HTTPError:
        return True  # it wants a token
    except OSError:
        return False
    return True


@contextlib.contextmanager
def head_node(
    folder: Path, environment: Mapping[str, str]
) -> Iterator[tuple[str, dict[str, str], subprocess.Popen[str]]]:
    """Start a head node on loopback.

    Gives its dashboard's URL, the environment of one who may use it, and its process.
    """
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    allowed = {**os.environ, **environment, "PATH": path, "RAY_AUTH_MODE": "token"}
    allowed["RAY_AUTH_TOKEN_PATH"] = str(token)
    # Ray: sockets live in this folder, and their paths may have about 100 characters.
    place = Path("/tmp") / f"sr-{uuid.uuid4().hex[:8]}"
    url = f"http://127.0.0.1:{(port := free_port())}"
    line = [
        *(str(RAY), "start", "--head", "--block", "--node-ip-address=127.0.0.1"),
        *(f"--port={free_port()}", "--dashboard-host=127.0.0.1", f"--dashboard-port={port}"),
        *("--num-cpus=4", "--object-store-memory=200000000", f"--temp-dir={place}"),
    ]
    log = folder / "head.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            line,
            env=allowed,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            text=True,
        )
    deadline = time.monotonic() + DEADLINE_S
    try:
        while not _answers(url):
            assert process.poll() is None, log.read_text()[-2000:]
            assert time.monotonic() < deadline
            time.sleep(0.5)
        yield url, allowed, process
    finally:
        started = [*psutil.Process(process.pid).children(recursive=True)]
        started.append(psutil.Process(process.pid))
        process.terminate()
        _, alive = psutil.wait_procs(started, timeout=20)
        for one in alive:
            one.kill()
        process.wait()
        shutil.rmtree(place, ignore_errors=True)
