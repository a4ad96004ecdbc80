"""Asking: questions put to a running service, and who answers each of them, why, and what."""

import contextlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx

from sae_ray.curate.sources import EMBEDDED
from sae_ray.errors import WorkError
from sae_ray.experts.gathering import gather
from sae_ray.experts.registry import ExpertRegistry

SECOND = "Say which cooking step comes next in a recipe"
"""A second task for the embedded default."""
QUESTIONS = (
    "Prices at the school: 6, 1, 4. Write them from cheap to dear.",
    'What follows "slice the radish" when Clara makes salad?',
    "Where does the captain live, and what is he fond of?",
)
"""For the embedded default: of two domains, and of neither."""
_MIXTURE, _BASE = "moie", "base"
"""Models that every service has."""
_START_S = 300.0
_STOP_S = 60.0
_TIMEOUT_S = 120.0
"""Of one answer."""
_NUM_REASONS = 3


def try_out(
    registry: ExpertRegistry, router: str, jobs: Path, questions: Sequence[str] = QUESTIONS
) -> Iterator[str]:
    """Fit a router over the embedded model's experts, serve them, and yield what is answered.

    Args:
        registry: where the experts are.
        router: where the router goes.
        jobs: the folder of the jobs, of which serve.py serves them.
        questions: what is asked.

    Raises:
        WorkError: the service does not start.
    """
    fitted, _ = gather(registry, lm=EMBEDDED, sae=EMBEDDED)
    fitted.save(router, EMBEDDED, EMBEDDED)
    with service(jobs / "serve.py", f"--registry={registry.path}", f"--router={router}") as url:
        yield from ask(url, questions)


@contextlib.contextmanager
def service(job: Path, *flags: str) -> Iterator[str]:
    """Run a job that takes `--port` and prints where it serves, while the block lasts.

    Raises:
        WorkError: it ends before it serves, or takes too long to.
    """
    command = [sys.executable, str(job), *flags, f"--port={_free_port()}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        late, began = threading.Timer(_START_S, process.kill), time.monotonic()
        late.start()
        try:
            url = _address(process)
            if url is None:
                soon = time.monotonic() - began < _START_S
                why = "ended" if soon else f"was not there after {_START_S:g} s"
                raise WorkError(
                    f"the service {why} ({' '.join(command[1:])}): its own words are above"
                )
            late.cancel()
            yield url
        finally:
            late.cancel()
            process.send_signal(signal.SIGINT)  # of the other one Ray says that it was received
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_STOP_S)
            process.kill()


def _address(process: subprocess.Popen[str]) -> str | None:
    """Return where a service says that it serves; None where it ends before."""
    assert process.stdout is not None
    found = (line.split()[-1] for line in process.stdout if line.startswith("serving at "))
    return next(found, None)


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def ask(url: str, questions: Sequence[str], *, max_tokens: int = 24) -> Iterator[str]:
    """Yield a few lines for people about each question.

    Args:
        url: of the service, without /v1.
        questions: each a conversation of its own.
        max_tokens: of an answer.

    Raises:
        httpx.HTTPError: the service does not answer.
    """
    for question in questions:
        body = {
            "model": _MIXTURE,
            "messages": [{"role": "user", "content": question}],
            "max_tokens": max_tokens,
            "temperature": 0,
        }
        response = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=_TIMEOUT_S)
        said = response.raise_for_status().json()
        route = said["route"]
        who = ", ".join(one["name"] for one in route["experts"]) or _BASE
        why = "; ".join(
            f"{one['label'] or one['latent']} ({one['contribution']:+.2f})"
            for one in route["reasons"][:_NUM_REASONS]
        )
        answer = " ".join(said["choices"][0]["message"]["content"].split())
        yield f"{question}\n   {who}: {answer}\n   because: {why}"
