"""Asking: questions put to a running service, and who answers each of them, why, and what."""

import contextlib
import signal
import subprocess
import sys
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
_SERVE = Path(__file__).parents[2] / "jobs" / "serve.py"
_PORT = 8123
_TIMEOUT_S = 120.0
_NUM_REASONS = 3


def try_out(
    registry: ExpertRegistry, router: str, questions: Sequence[str] = QUESTIONS
) -> Iterator[str]:
    """Fit a router over the embedded model's experts, serve them, and yield what is answered.

    Raises:
        WorkError: the service does not start.
    """
    gather(registry, lm=EMBEDDED, sae=EMBEDDED).save(router, EMBEDDED, EMBEDDED)
    with service(f"--registry={registry.path}", f"--router={router}", f"--port={_PORT}") as url:
        yield from ask(url, questions)


@contextlib.contextmanager
def service(*flags: str) -> Iterator[str]:
    """Run `jobs/serve.py` while the block lasts, and give its URL.

    Raises:
        WorkError: it ends before it serves.
    """
    command = [sys.executable, str(_SERVE), *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if line.startswith("serving at "):
                    yield line.split()[-1]
                    return
            raise WorkError(
                f"the service did not start ({' '.join(command[1:])}): its own words are above"
            )
        finally:
            process.send_signal(signal.SIGINT)  # of the other one Ray says that it was received


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
