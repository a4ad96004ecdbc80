"""A real service in processes of its own, and clients that ask it without pause."""

import contextlib
import dataclasses
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import httpx
import openai
import psutil

ROOT = Path(__file__).parents[1]
DEADLINE_S = 400


def free_port() -> int:
    """Return a port that nobody listens at."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def wait_until(condition: Callable[[], bool], what: str) -> float:
    """Wait until something holds; return after how many seconds."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() < started + DEADLINE_S, f"never: {what}"
        time.sleep(0.05)
    return time.monotonic() - started


@dataclasses.dataclass(frozen=True)
class Service:
    """A service that answers, and the process that it all descends from."""

    url: str
    process: subprocess.Popen[str]
    log: Path

    def answers(self) -> bool:
        """Say whether it takes requests."""
        try:
            return httpx.get(f"{self.url.removesuffix('/v1')}/readyz", timeout=60).is_success
        except httpx.HTTPError:
            return False

    def actors(self, title: str) -> list[psutil.Process]:
        """Return the processes of Ray's actors whose title begins so."""
        found = []
        for one in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if " ".join(one.cmdline()).startswith(f"ray::{title}"):
                    found.append(one)
        return found

    def replicas(self, deployment: str) -> list[psutil.Process]:
        """Return the processes of a deployment."""
        return self.actors(f"ServeReplica:moie:{deployment}")


@contextlib.contextmanager
def serving(folder: Path, flags: Sequence[str], *, script: Path | None = None) -> Iterator[Service]:
    """Start a service as a user does and stop it as one; both must go well."""
    port = free_port()
    program = script or ROOT / "jobs" / "serve.py"
    command = [sys.executable, str(program), f"--port={port}", *flags]
    log = folder / "log"
    with log.open("wb") as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if line.startswith("serving at"):
                break
        else:
            raise AssertionError(log.read_text()[-3000:])
        yield Service(f"http://127.0.0.1:{port}/v1", process, log)
    finally:
        process.send_signal(signal.SIGINT)
        with process.stdin, process.stdout:
            process.stdout.read()
        assert process.wait(DEADLINE_S) == 0, log.read_text()[-3000:]


@dataclasses.dataclass
class Load:
    """Clients that ask one thing after the other, and what they were told.

    A model is asked the same each time, greedily, so that every whole answer is known beforehand.
    """

    url: str
    asked: dict[str, str]
    """What is asked of each model."""
    max_tokens: int = 150
    whole: list[str] = dataclasses.field(default_factory=list)
    """Models that answered, in order."""
    streamed: list[str] = dataclasses.field(default_factory=list)
    broken: list[dict] = dataclasses.field(default_factory=list)
    """Error events at the end of streams."""
    wrong: list[str] = dataclasses.field(default_factory=list)
    """What must not happen: answers that never came, came otherwise or were cut off unsaid."""

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        self._client = openai.OpenAI(
            base_url=self.url, api_key="none", max_retries=0, timeout=DEADLINE_S
        )
        self._raw = httpx.Client(base_url=self.url, timeout=DEADLINE_S)
        self.known = {model: self._ask(model) for model in self.asked}

    def __enter__(self) -> "Load":
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()
        self._raw.close()

    @contextlib.contextmanager
    def running(self, *, whole: int = 3, streams: int = 2) -> Iterator[None]:
        """Ask until the block is left."""
        threads = [
            threading.Thread(target=self._repeat, args=(ask, offset))
            for ask, num in ((self._ask_whole, whole), (self._ask_stream, streams))
            for offset in range(num)
        ]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._stop.set()
            for thread in threads:
                thread.join()
            self._stop.clear()

    def wait_for(self, more: int) -> float:
        """Wait until so many more whole answers have come; return after how many seconds."""
        until = len(self.whole) + more
        return wait_until(lambda: len(self.whole) >= until or bool(self.wrong), f"{more} answers")

    def _repeat(self, ask: Callable[[str], None], turn: int) -> None:
        models = list(self.asked)
        while not self._stop.is_set():
            turn += 1
            try:
                ask(models[turn % len(models)])
            except (openai.OpenAIError, httpx.HTTPError, ValueError) as error:
                self.wrong.append(f"{type(error).__name__}: {error}")
                time.sleep(0.1)

    def _messages(self, model: str) -> list:
        return [{"role": "user", "content": self.asked[model]}]

    def _ask(self, model: str) -> str | None:
        said = self._client.chat.completions.create(
            model=model, messages=self._messages(model), temperature=0, max_tokens=self.max_tokens
        )
        return said.choices[0].message.content

    def _ask_whole(self, model: str) -> None:
        if self._ask(model) == self.known[model]:
            self.whole.append(model)
        else:
            self.wrong.append(f"{model} answers otherwise")

    def _ask_stream(self, model: str) -> None:
        body = {"model": model, "messages": self._messages(model), "stream": True}
        body |= {"temperature": 0, "max_tokens": self.max_tokens}
        with self._raw.stream("POST", "/chat/completions", json=body) as response:
            response.raise_for_status()
            events = [line[6:] for line in response.iter_lines() if line.startswith("data: ")]
        last = events.pop()
        said = [json.loads(event) for event in events]
        text = "".join(one["choices"][0]["delta"]["content"] for one in said)
        if last == "[DONE]" and text == self.known[model]:
            self.streamed.append(model)
        elif set(json.loads(last).get("error", ())) == {"message", "type", "param", "code"}:
            self.broken.append(json.loads(last)["error"])
        else:
            self.wrong.append(f"a stream of {model} ends with {last[:100]}")
