"""A local HTTP server that speaks OpenAI's chat completions as far as it is told to."""

import http.server
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Endpoint(http.server.ThreadingHTTPServer):
    """Answers what was queued, then by its rule, and keeps what it was asked: path, headers, body.

    A rule takes the last message and returns what is said.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.asked: list[tuple[str, dict[str, str], dict]] = []
        self.answers: list[tuple[int, dict[str, str], str]] = []
        self.slow_s = 0.0
        self.rule: Callable[[str], str] | None = None
        self.lock = threading.Lock()

    def says(self, content: object, status: int = 200, **headers: str) -> None:
        """Queue a completion with this content."""
        message = {"role": "assistant", "content": content}
        body = json.dumps({"object": "chat.completion", "choices": [{"message": message}]})
        self.replies(body, status, **headers)

    def replies(self, body: str, status: int = 200, **headers: str) -> None:
        """Queue an answer of any kind."""
        self.answers.append((status, headers, body))


class Handler(http.server.BaseHTTPRequestHandler):
    server: Endpoint  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.asked.append((self.path, dict(self.headers), body))
            if not self.server.answers and self.server.rule:
                self.server.says(self.server.rule(body["messages"][-1]["content"]))
            status, headers, text = self.server.answers.pop(0)
        time.sleep(self.server.slow_s)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing on stderr."""


@contextmanager
def serve() -> Iterator[Endpoint]:
    """Run an endpoint on loopback."""
    with Endpoint() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
