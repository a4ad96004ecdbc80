import json
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sae_ray.chat import Conversation
from sae_ray.curate.pseudo import (
    ask_for_pseudo_queries,
    read_pseudo_queries,
    write_pseudo_queries,
)
from sae_ray.errors import TaskError
from tests.endpoint import Endpoint, serve

KEY = "sk-very-secret"
WRITTEN = [{"prompt": "2 + 2?", "response": "4"}, {"prompt": "Take 3 from 9."}]


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    with serve() as server:
        yield server


def ask(url: str, api_key: str | None = KEY, timeout_s: float = 20.0) -> list[Conversation]:
    return ask_for_pseudo_queries(
        "Do sums", base_url=url, model="m", api_key=api_key, timeout_s=timeout_s, wait_s=0.01
    )


def refusal(url: str, **how: object) -> str:
    with pytest.raises(TaskError) as caught:
        ask(url, **how)  # pyright: ignore[reportArgumentType]
    assert KEY not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("wrap", ["{}", "Here you are:\n```json\n{}\n```\nEnjoy!"])
def test_a_model_writes_conversations_from_the_description_alone(
    endpoint: Endpoint, wrap: str
) -> None:
    endpoint.says(wrap.format(json.dumps(WRITTEN)))
    found = ask(endpoint.url + "/")
    assert [[(m["role"], m["content"]) for m in one.messages] for one in found] == [
        [("user", "2 + 2?"), ("assistant", "4")],
        [("user", "Take 3 from 9.")],
    ]
    ((path, headers, body),) = endpoint.asked
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert body["model"] == "m"
    assert "Do sums" in body["messages"][0]["content"]


def test_no_key_no_header(endpoint: Endpoint) -> None:
    endpoint.says(json.dumps(WRITTEN))
    ask(endpoint.url, api_key=None)
    assert "Authorization" not in endpoint.asked[0][1]


@pytest.mark.parametrize(
    "content",
    [
        "I would rather not.",
        "[not json]",
        "[]",
        '[{"response": "4"}]',
        '[{"prompt": 4}]',
        '[{"prompt": " "}]',
        '["2 + 2?"]',
        None,
    ],
)
def test_an_answer_that_holds_no_conversations_is_refused(
    endpoint: Endpoint, content: str | None
) -> None:
    endpoint.says(content)
    assert "a JSON list of prompt and response" in refusal(endpoint.url)
    assert len(endpoint.asked) == 1


@pytest.mark.parametrize("body", ["<html>", "{}", '{"choices": []}', "[1]", '{"choices": [null]}'])
def test_an_answer_of_something_else_is_refused(endpoint: Endpoint, body: str) -> None:
    endpoint.replies(body)
    assert "no chat completion: an OpenAI-compatible URL" in refusal(endpoint.url)


def test_a_busy_endpoint_is_asked_again_when_it_says(endpoint: Endpoint) -> None:
    endpoint.replies("slow down", 429, Retry_After="1")
    endpoint.replies("ouch", 503)
    endpoint.says(json.dumps(WRITTEN))
    before = time.monotonic()
    assert len(ask(endpoint.url)) == 2
    assert time.monotonic() - before >= 1
    assert len(endpoint.asked) == 3


@pytest.mark.parametrize("status", [429, 500, 503])
def test_an_endpoint_that_stays_busy_is_left_in_peace(endpoint: Endpoint, status: int) -> None:
    for _ in range(9):
        endpoint.replies(f"broken, {KEY}", status)
    said = refusal(endpoint.url)
    assert str(status) in said
    assert "'broken, [key]'" in said
    assert len(endpoint.asked) == 3


@pytest.mark.parametrize("status", [400, 404, 302])
def test_a_refusal_is_not_repeated(endpoint: Endpoint, status: int) -> None:
    endpoint.replies("no such model", status, Location="http://127.0.0.1:9/elsewhere")
    assert "no such model" in refusal(endpoint.url)
    assert len(endpoint.asked) == 1


def test_a_wrong_key_says_where_the_right_one_goes(endpoint: Endpoint) -> None:
    endpoint.replies(json.dumps({"error": {"message": f"Incorrect API key: {KEY}"}}), 401)
    said = refusal(endpoint.url)
    assert "401 Unauthorized" in said
    assert "OPENAI_API_KEY" in said


def test_an_endpoint_that_does_not_answer_in_time_is_given_up(endpoint: Endpoint) -> None:
    endpoint.slow_s = 0.5
    endpoint.says(json.dumps(WRITTEN))
    assert "has not answered for 0.1 s" in refusal(endpoint.url, timeout_s=0.1)


def test_an_endpoint_that_is_not_there_is_said_to_be_so() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and never listening
        said = refusal(f"http://127.0.0.1:{taken.getsockname()[1]}/v1")
    assert "cannot be reached" in said
    assert "check address and network" in said


@pytest.mark.parametrize("url", ["", "host/v1", "ftp://host/v1", "http://", "http://[::1/v1"])
def test_what_is_no_address_is_refused(url: str) -> None:
    assert "pseudo_url" in refusal(url)


@pytest.mark.parametrize("url", [f"https://u:{KEY}@host/v1", f"https://host/v1?key={KEY}"])
def test_an_address_may_not_hold_a_secret_since_it_is_written_down(url: str) -> None:
    assert "OPENAI_API_KEY" in refusal(url)


@pytest.mark.parametrize("key", [KEY + "\n", KEY + "\x00", KEY + "é"])
def test_a_key_that_no_header_can_hold_is_refused_unsaid(endpoint: Endpoint, key: str) -> None:
    assert "OPENAI_API_KEY" in refusal(endpoint.url, api_key=key)
    assert endpoint.asked == []


def test_a_file_holds_prompts_or_json_a_line(tmp_path: Path) -> None:
    file = tmp_path / "queries.txt"
    file.write_bytes(
        b'\xef\xbb\xbfWhat is 2 + 2?\r\n\r\n{"prompt": "3?", "response": "4"}\n'
        + '{"prompt": "a\u2028b\u0085c"}'.encode()
    )
    found = read_pseudo_queries(str(file))
    assert [[m["content"] for m in one.messages] for one in found] == [
        ["What is 2 + 2?"],
        ["3?", "4"],
        ["a\u2028b\u0085c"],
    ]
    write_pseudo_queries(str(tmp_path / "again.jsonl"), found)
    again = read_pseudo_queries(str(tmp_path / "again.jsonl"))
    assert [one.messages for one in again] == [one.messages for one in found]


def test_what_an_answer_was_made_of_is_read_again_from_where_answers_lie(s3_folder: str) -> None:
    one = Conversation("pseudo-0", [{"role": "user", "content": "2 + 2?"}])
    write_pseudo_queries(f"{s3_folder}/out/pseudo_queries.jsonl", [one])
    assert read_pseudo_queries(f"{s3_folder}/out/pseudo_queries.jsonl") == [one]


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (lambda file: None, "cannot be read"),
        (lambda file: file.write_bytes(b"\xff\xfe"), "UTF-8"),
        (lambda file: file.write_text(" \n\n"), "is empty"),
        (lambda file: file.write_text('fine\n{"prompt": 3}'), "line 2"),
        (lambda file: file.write_text('{"response": "x"}'), "line 1"),
        (lambda file: file.write_text('{"prompt": null, "response": "x"}'), "line 1"),
        (lambda file: file.write_text("{broken"), "line 1"),
    ],
)
def test_a_bad_file_is_answered_with_what_to_do(
    tmp_path: Path, write: Callable[[Path], object], says: str
) -> None:
    write(tmp_path / "queries.txt")
    with pytest.raises(TaskError, match=says):
        read_pseudo_queries(str(tmp_path / "queries.txt"))
