import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import openai
import pytest
from ray import serve
from ray.serve.config import HTTPOptions

from sae_ray.adapters.attach import AdapterSpec
from sae_ray.config import run_job
from sae_ray.errors import ConfigError
from sae_ray.experts.registry import ExpertRegistry
from sae_ray.experts.settings import ServeSettings
from serve.app import build
from serve.hosts import require_keys_beyond_loopback
from serve.keys import add_key
from serve.running import running
from tests.made_experts import add_expert

ROOT = Path(__file__).parents[2]
ASKED = {"messages": [{"role": "user", "content": "Write a query"}], "temperature": 0}


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture(scope="module")
def served(
    tmp_path_factory: pytest.TempPathFactory, tiny_lm_of: Callable[[str], Path]
) -> Iterator[tuple[str, str, str]]:
    """The URL of a real Serve with two experts, a key for it, and its registry."""
    folder = tmp_path_factory.mktemp("served")
    lm = str(tiny_lm_of("llama"))
    registry = ExpertRegistry(str(folder / "registry"))
    for seed, name in enumerate(("sums", "rivers")):
        add_expert(registry, name, AdapterSpec(kind="lora", r=2), lm=lm, seed=seed)
    key = add_key(str(folder / "keys"), "test")
    port = free_port()
    command = [sys.executable, str(ROOT / "jobs" / "serve.py"), f"--lm={lm}", f"--port={port}"]
    command += [f"--registry={registry.path}", f"--keys={folder}/keys", "--reload_s=0.3"]
    command += ["--max_rows=4", "--max_waiting=4"]
    with (folder / "log").open("wb") as log:
        service = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log)
    try:
        assert service.stdout is not None
        for line in service.stdout:
            if line.startswith(b"serving at"):
                break
        else:
            raise AssertionError((folder / "log").read_text()[-3000:])
        yield f"http://127.0.0.1:{port}/v1", key, registry.path
    finally:
        service.send_signal(signal.SIGINT)
        assert service.stdout is not None
        service.stdout.close()
        assert service.wait(120) == 0
    text = (folder / "log").read_text()
    assert key not in text
    assert "Write a query" not in text


@pytest.fixture(scope="module")
def client(served: tuple[str, str, str]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=served[0], api_key=served[1], max_retries=0) as client:
        yield client


pytestmark = pytest.mark.ray


def test_openais_client_chats_streams_and_lists(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["base", "rivers", "sums"]
    said = {}
    for model in ("base", "rivers", "sums"):
        whole = client.chat.completions.create(model=model, max_tokens=12, **ASKED)
        said[model] = whole.choices[0].message.content
        assert whole.usage is not None
        assert whole.usage.completion_tokens <= 12
        names = [one["name"] for one in whole.model_extra["route"]["experts"]]  # pyright: ignore
        assert names == ([] if model == "base" else [model])
        stream = client.chat.completions.create(model=model, max_tokens=12, stream=True, **ASKED)
        assert "".join(c.choices[0].delta.content or "" for c in stream) == said[model]
    assert len(set(said.values())) == 3
    raw = client.chat.completions.with_raw_response.create(model="sums", max_tokens=2, **ASKED)
    assert raw.headers["x-moie-route"] == "sums"
    text = client.completions.create(model="rivers", prompt="Write", temperature=0, logprobs=1)
    assert text.choices[0].logprobs is not None
    assert text.choices[0].logprobs.token_logprobs


def test_openais_client_knows_the_errors(
    client: openai.OpenAI, served: tuple[str, str, str]
) -> None:
    with pytest.raises(openai.NotFoundError, match="choose one of base, rivers, sums"):
        client.chat.completions.create(model="nobody", **ASKED)
    with pytest.raises(openai.BadRequestError, match="tool calls are not served"):
        client.chat.completions.create(model="base", tools=[], **ASKED)
    with pytest.raises(openai.BadRequestError, match="context is 512") as caught:
        client.chat.completions.create(model="base", max_tokens=5000, **ASKED)
    assert caught.value.code == "context_length_exceeded"
    stranger = openai.OpenAI(base_url=served[0], api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        stranger.models.list()


def test_bad_bodies_never_make_a_500_nor_hold_a_place(served: tuple[str, str, str]) -> None:
    headers = {"authorization": f"Bearer {served[1]}", "content-type": "application/json"}
    with httpx.Client(base_url=served[0], headers=headers, timeout=30) as client:
        for content in (b"", b"{", b"[" * 100_000, b"\x00", b"x" * 10_000_000):
            response = client.post("/chat/completions", content=content)
            assert response.status_code in (400, 413)
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_more_than_it_can_do_is_refused_at_once_and_who_leaves_is_not_answered(
    client: openai.OpenAI,
) -> None:
    answered, refused = [], []

    def ask() -> None:
        started = time.perf_counter()
        try:
            one = client.chat.completions.create(model="sums", max_tokens=300, **ASKED)
            answered.append(one.choices[0].message.content)
        except openai.RateLimitError as error:
            refused.append((time.perf_counter() - started, error.response.headers["retry-after"]))

    threads = [threading.Thread(target=ask) for _ in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answered) + len(refused) == 24
    assert refused
    assert len(set(answered)) == 1
    # Who leaves in the middle makes room: many more than there are rows.
    for _ in range(12):
        stream = client.chat.completions.create(model="sums", max_tokens=400, stream=True, **ASKED)
        next(iter(stream))
        stream.close()
    started = time.perf_counter()
    client.chat.completions.create(model="sums", max_tokens=2, **ASKED)
    assert time.perf_counter() - started < 20


def test_a_new_version_is_served_without_a_restart(
    client: openai.OpenAI, served: tuple[str, str, str], tiny_lm_of: Callable[[str], Path]
) -> None:
    registry = ExpertRegistry(served[2])
    spec = AdapterSpec(kind="lora", r=3)
    new = add_expert(registry, "cities", spec, lm=str(tiny_lm_of("llama")), seed=9)
    until = time.monotonic() + 30
    while "cities" not in (names := [model.id for model in client.models.list()]):
        assert time.monotonic() < until, names
        time.sleep(0.3)
    said = client.chat.completions.create(model="cities", max_tokens=3, **ASKED)
    assert said.model_extra["route"]["experts"][0]["id"] == new.id  # pyright: ignore


def test_beyond_loopback_keys_are_a_must(capsys: pytest.CaptureFixture[str]) -> None:
    for host in ("127.0.0.1", "::1", "localhost"):
        require_keys_beyond_loopback(host, None)
    for host in ("0.0.0.0", "192.168.0.5", "example.org"):
        require_keys_beyond_loopback(host, "keys")
        with pytest.raises(ConfigError, match="everyone may ask"):
            require_keys_beyond_loopback(host, None)

    def main(settings: ServeSettings) -> None:
        require_keys_beyond_loopback(settings.host, settings.keys)

    assert run_job(main, ServeSettings, ["--host=0.0.0.0"]) == 2
    assert "--keys" in capsys.readouterr().err


@serve.deployment(ray_actor_options={"num_cpus": 0})
class Another:
    def __call__(self) -> str:
        return "still here"


def test_what_others_serve_stays_and_their_address_is_heeded(
    ray_cluster: None, tmp_path: Path, tiny_lm_of: Callable[[str], Path]
) -> None:
    port, lm = free_port(), str(tiny_lm_of("llama"))
    serve.start(http_options=HTTPOptions(host="0.0.0.0", port=port))
    try:
        another = serve.run(Another.bind(), name="another", route_prefix="/another")  # pyright: ignore
        add_key(str(tmp_path / "keys"), "test")
        keys = str(tmp_path / "keys")
        # Serve listens beyond loopback already, whatever is asked for here.
        for settings in (ServeSettings(lm=lm), ServeSettings(lm=lm, host="0.0.0.0", port=port)):
            with pytest.raises(ConfigError, match="everyone may ask"), running(settings):
                pass
        with pytest.raises(ConfigError, match="everyone may ask"):
            build(ServeSettings(lm=lm))
        elsewhere = ServeSettings(lm=lm, keys=keys, host="127.0.0.1", port=port)
        with pytest.raises(ConfigError, match=f"Serve listens at 0.0.0.0:{port}"):
            build(elsewhere)
        with running(ServeSettings(lm=lm, keys=keys)) as url:
            assert url == f"http://0.0.0.0:{port}"
            at = f"http://127.0.0.1:{port}"
            assert httpx.get(f"{at}/healthz").json() == {"status": "ok"}
            with pytest.raises(ConfigError, match="serves an application 'moie' already"):
                running(ServeSettings(lm=lm, keys=keys)).__enter__()
        assert set(serve.status().applications) == {"another"}
        assert another.remote().result(timeout_s=60) == "still here"
    finally:
        serve.shutdown()
