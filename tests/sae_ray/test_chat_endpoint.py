"""A chat endpoint that is busy, slow, wrong or shut: asked again where that helps, told apart."""

import datetime
import email.utils
import json
import socket
from collections.abc import Iterator

import pytest

from sae_ray.chat import Message
from sae_ray.chat_endpoint import ChatEndpoint, NoAnswerError
from sae_ray.errors import EndpointError
from tests.endpoint import Endpoint, serve

KEY = "sk-very-secret"
ASKED: list[Message] = [{"role": "user", "content": "Well?"}]


@pytest.fixture
def server() -> Iterator[Endpoint]:
    with serve() as server:
        yield server


def endpoint(url: str, timeout_s: float = 10.0) -> ChatEndpoint:
    return ChatEndpoint(url, "m", KEY, timeout_s=timeout_s, num_tries=3, wait_s=0.01)


def test_what_is_said_comes_back_with_what_it_took(server: Endpoint) -> None:
    body = {
        "choices": [{"message": {"content": "Well."}}],
        "usage": {"prompt_tokens": 7, "completion_tokens": 2},
    }
    server.replies(json.dumps(body))
    server.says(None)
    reply = endpoint(server.url + "/").ask(ASKED, max_tokens=9)
    assert (reply.text, reply.prompt_tokens, reply.reply_tokens) == ("Well.", 7, 2)
    ((path, headers, asked),) = server.asked
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert asked == {"model": "m", "messages": ASKED, "temperature": 0.0, "max_tokens": 9}
    assert endpoint(server.url).ask(ASKED).text == ""  # a model that only thought


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_one_is_asked_again(server: Endpoint, status: int) -> None:
    server.replies("busy", status)
    server.replies("busy", status)
    server.says("Well.")
    assert endpoint(server.url).ask(ASKED).text == "Well."
    assert len(server.asked) == 3


def test_it_waits_as_long_as_it_is_told_in_seconds_or_by_date(
    server: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    # The server sleeps too, for no time.
    monkeypatch.setattr("sae_ray.chat_endpoint.time.sleep", lambda s: s and waits.append(s))
    in_forty = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=40)
    date = email.utils.format_datetime(in_forty, usegmt=True)
    for told in ("1.5", date, "3600", "soon", None):
        server.replies("", 429, **({"retry_after": told} if told else {}))
        server.says("Well.")
        endpoint(server.url).ask(ASKED)
    assert waits[0] == 1.5
    assert 20 < waits[1] <= 40
    assert waits[2:] == [60, 0.01, 0.01]
    server.replies("", 500)
    server.replies("", 500)
    server.says("Well.")
    endpoint(server.url).ask(ASKED)
    assert waits[5:] == [0.01, 0.02]


def test_one_that_stays_busy_or_silent_gives_no_answer(server: Endpoint) -> None:
    for _ in range(3):
        server.replies(f"busy {KEY}", 429)
    with pytest.raises(NoAnswerError, match=r"3 tries \(429 .*busy \[key\]") as caught:
        endpoint(server.url).ask(ASKED)
    assert KEY not in str(caught.value)
    server.slow_s = 0.5
    for _ in range(3):
        server.says("Well.")
    with pytest.raises(NoAnswerError, match=r"nothing for 0.05 s"):
        endpoint(server.url, timeout_s=0.05).ask(ASKED)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        with pytest.raises(NoAnswerError, match="Connection refused"):
            endpoint(f"http://127.0.0.1:{closed.getsockname()[1]}").ask(ASKED)


def test_one_that_refuses_is_not_asked_again(server: Endpoint) -> None:
    server.replies(f"no such key {KEY}", 401)
    with pytest.raises(EndpointError, match=r"401 .*OPENAI_API_KEY") as caught:
        endpoint(server.url).ask(ASKED)
    assert KEY not in str(caught.value)
    for body in ("<html>", "[]", '{"choices": []}', '{"error": "x"}', "null"):
        server.replies(body)
        with pytest.raises(EndpointError, match="no chat completion"):
            endpoint(server.url).ask(ASKED)
    assert len(server.asked) == 6


@pytest.mark.parametrize(
    "url", ["ftp://host/v1", "host/v1", "http://", "http://me:pw@host/v1", "http://host/v1?key=x"]
)
def test_an_address_that_cannot_be_is_refused_before_anything_is_asked(url: str) -> None:
    with pytest.raises(EndpointError, match="give"):
        endpoint(url)


def test_a_key_that_cannot_stand_in_a_header_is_refused() -> None:
    with pytest.raises(EndpointError, match="OPENAI_API_KEY holds a line break") as caught:
        ChatEndpoint("http://host/v1", "m", "sk-very\nsecret")
    assert "secret" not in str(caught.value)
