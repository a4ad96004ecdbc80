import asyncio
import concurrent.futures
import contextlib
import json
import logging
import time
from pathlib import Path
from typing import Any

import openai
import pytest
import starlette.requests
from ray.exceptions import RayActorError, RayTaskError

from sae_ray.errors import RegistryError
from sae_ray.experts.answers import Ask, Sampling, Ticket
from serve.gateway import Question, told
from serve.keys import Keys, add_key
from serve.routes import HttpLimits
from tests.serve.conftest import KeywordRouter, Service, client_of

HELLO = [{"role": "user", "content": "Write a query"}]
CHAT = "/v1/chat/completions"
JSON = {"content-type": "application/json"}


def body(**more: object) -> dict[str, Any]:
    return {"model": "sums", "messages": HELLO, "temperature": 0, "max_tokens": 8} | more


def events(text: str) -> list[dict]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def expect_error(response: Any, status: int, *said: str, param: str | None = None) -> None:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert all(one in error["message"] for one in said), error
    assert param is None or error["param"] == param


def test_models_are_the_mixture_the_base_and_every_expert(service: Service) -> None:
    listed = service.client.get("/v1/models").json()
    assert [one["id"] for one in listed["data"]] == ["moie", "base", "rivers", "sums"]
    assert service.client.get("/v1/models/sums").json()["object"] == "model"
    expect_error(service.client.get("/v1/models/nobody"), 404)


def test_a_chat_is_answered_at_once_and_in_a_stream_alike(service: Service) -> None:
    whole = service.client.post(CHAT, json=body())
    assert whole.status_code == 200
    said = whole.json()
    assert said["object"] == "chat.completion"
    assert said["choices"][0]["finish_reason"] in ("stop", "length")
    assert said["usage"]["total_tokens"] == said["usage"]["prompt_tokens"] + 8
    options = {"stream": True, "stream_options": {"include_usage": True}}
    streamed = service.client.post(CHAT, json=body(**options))
    assert streamed.headers["content-type"].startswith("text/event-stream")
    chunks = events(streamed.text)
    text = "".join(c["choices"][0]["delta"]["content"] for c in chunks if c["choices"])
    assert text == said["choices"][0]["message"]["content"]
    assert chunks[-1]["usage"] == said["usage"]
    assert chunks[-2]["choices"][0]["finish_reason"] == said["choices"][0]["finish_reason"]
    assert chunks[0]["route"]["experts"][0]["name"] == "sums"
    assert whole.headers["x-moie-route"] == streamed.headers["x-moie-route"] == "sums"


def test_the_mixture_says_who_answers_and_why_and_the_answer_is_that_experts(
    service: Service,
) -> None:
    messages = [{"role": "user", "content": "about rivers"}]
    routed = service.client.post(CHAT, json=body(model="moie", messages=messages)).json()
    direct = service.client.post(CHAT, json=body(model="rivers", messages=messages)).json()
    other = service.client.post(CHAT, json=body(model="sums", messages=messages)).json()
    assert routed["choices"][0]["message"] == direct["choices"][0]["message"]
    assert routed["choices"][0]["message"] != other["choices"][0]["message"]
    assert direct["route"] == {
        "experts": [{"id": service.ids["rivers"], "name": "rivers", "weight": 1.0}],
        "chosen_by": "client",
    }
    assert routed["route"] == direct["route"] | {
        "chosen_by": "router",
        "abstained": False,
        "reasons": [{"latent": 7, "label": "says the word", "contribution": 0.5}],
        "scores": {"sums": 0.0, "rivers": 1.0},
    }
    decided = service.client.post("/v1/route", json={"messages": messages})
    assert decided.json() == {"object": "route"} | routed["route"]
    assert decided.headers["x-moie-route"] == "rivers"
    read = service.client.post("/v1/route", json={"messages": messages, "tokens": True}).json()
    tokens = read.pop("tokens")
    assert read == decided.json()
    assert tokens == [
        {"text": "about", "activations": {}},
        {"text": "rivers", "activations": {"7": 2.0}},
    ]


def test_the_mixture_stays_with_the_base_or_with_who_answered_before(service: Service) -> None:
    routed = service.client.post(CHAT, json=body(model="moie"))
    base = service.client.post(CHAT, json=body(model="base")).json()
    assert routed.json()["route"]["abstained"]
    assert routed.headers["x-moie-route"] == "base"
    assert routed.json()["choices"][0]["message"] == base["choices"][0]["message"]
    stay = {"previous": service.ids["sums"]}
    stayed = service.client.post(CHAT, json=body(model="moie", moie=stay))
    assert stayed.headers["x-moie-route"] == "sums"
    both = [{"role": "user", "content": "sums and rivers"}]
    two = service.client.post(CHAT, json=body(model="moie", messages=both, moie={"top_k": 2}))
    assert two.headers["x-moie-route"] == "rivers,sums"
    assert [one["weight"] for one in two.json()["route"]["experts"]] == [0.5, 0.5]


def text_of(said: dict) -> str:
    return said["choices"][0]["text"]


def test_completions_go_on_with_text_or_tokens(service: Service) -> None:
    asked = {"model": "sums", "prompt": "Write a query", "temperature": 0, "logprobs": 2}
    said = service.client.post("/v1/completions", json=asked).json()
    assert said["object"] == "text_completion"
    assert said["usage"]["completion_tokens"] == 16
    logprobs = said["choices"][0]["logprobs"]
    # Tokens that hold a part of a character each are told as the mark of what cannot be shown.
    plain = [one.encode("ascii", "ignore") for one in ("".join(logprobs["tokens"]), text_of(said))]
    assert plain[0] == plain[1]
    assert plain[0]
    for top, value in zip(logprobs["top_logprobs"], logprobs["token_logprobs"], strict=True):
        assert max(top.values()) == pytest.approx(value), (top, value)
    ids = list(service.replica._engine.prompts.of_text("Write a query"))
    again = service.client.post("/v1/completions", json=asked | {"prompt": ids, "logprobs": None})
    assert again.json()["choices"][0]["text"] == said["choices"][0]["text"]
    two = service.client.post("/v1/completions", json=asked | {"prompt": ["a", "b"]})
    expect_error(two, 400, "2 prompts", param="prompt")
    alien = service.client.post("/v1/completions", json=asked | {"prompt": [-1]})
    expect_error(alien, 400, "none of 0 to", param="prompt")
    unread = service.client.post("/v1/completions", json=asked | {"model": "moie", "prompt": [5]})
    expect_error(unread, 400, "chooses by text", param="prompt")


BAD: dict[str, tuple[dict[str, Any], int, str]] = {
    "unknown model": (body(model="nobody"), 404, "choose one of moie, base, rivers, sums"),
    "no model": ({"messages": HELLO}, 400, "model"),
    "no messages": ({"model": "base"}, 400, "messages"),
    "empty messages": (body(messages=[]), 400, "messages"),
    "messages of text": (body(messages="hello"), 400, "messages"),
    "wrong role": (body(messages=[{"role": "robot", "content": "x"}]), 400, "messages.0.role"),
    "no content": (body(messages=[{"role": "user"}]), 400, "messages.0"),
    "a tool's turn": (body(messages=[{"role": "tool", "content": "x"}]), 400, "tool calls"),
    "tools": (body(tools=[{"type": "function"}]), 400, "tool calls"),
    "functions": (body(functions=[]), 400, "tool calls"),
    "an image": (
        body(
            messages=[
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}
                    ],
                }
            ]
        ),
        400,
        "only text",
    ),
    "json mode": (body(response_format={"type": "json_object"}), 400, "plain text"),
    "an unknown field": (body(colour="red"), 400, "Unrecognized request argument supplied: colour"),
    "negative temperature": (body(temperature=-1), 400, "temperature"),
    "huge temperature": (body(temperature=1e308), 400, "temperature"),
    "top_p of nothing": (body(top_p=0), 400, "top_p"),
    "no tokens": (body(max_tokens=0), 400, "max_tokens"),
    "a huge number of tokens": (body(max_tokens=10**30), 400, "max_tokens"),
    "more tokens than fit": (body(max_tokens=100_000), 400, "context is 512"),
    "a number for text": (body(model=5), 400, "model"),
    "text for a number": (body(temperature="hot"), 400, "temperature"),
    "a huge seed": (body(seed=2**70), 400, "seed"),
    "several answers": (body(n=2), 400, "n"),
    "a penalty": (body(presence_penalty=0.5), 400, "presence_penalty"),
    "biases": (body(logit_bias={"5": 1}), 400, "logit_bias"),
    "five stops": (body(stop=list("abcde")), 400, "stop"),
    "an empty stop": (body(stop=""), 400, "stop"),
    "too many likeliest tokens": (body(logprobs=True, top_logprobs=21), 400, "top_logprobs"),
    "likeliest tokens alone": (body(top_logprobs=2), 400, "needs logprobs"),
    "no route to take": (body(moie={"top_k": 0}), 400, "moie.top_k"),
    "a long prompt": (
        body(messages=[{"role": "user", "content": "word " * 2000}], max_tokens=None),
        400,
        "context is 512 tokens",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests_are_refused_in_openais_words(service: Service, case: str) -> None:
    asked, status, said = BAD[case]
    expect_error(service.client.post(CHAT, json=asked), status, said)
    expect_error(service.client.post(CHAT, json=asked | {"stream": True}), status, said)


RAW = {
    "nothing": b"",
    "half": b'{"model": "base", "messages": [',
    "no object": b"[1, 2]",
    "not utf-8": b'{"model": "\xff\xfe"}',
    "a lone surrogate": b'{"model": "base", "messages": [{"role": "user", "content": "\\ud800"}]}',
    "no number": b'{"model": "base", "messages": [], "temperature": NaN}',
    "deep": b'{"model": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep messages": b'{"model":"base","messages":'
    + b'[{"a":' * 20_000
    + b"1"
    + b"}]" * 20_000
    + b"}",
    "digits": b'{"model": "base", "messages": [], "seed": ' + b"9" * 10_000 + b"}",
    "null": b"null",
    "zeros": b"\x00" * 100,
}


@pytest.mark.parametrize("case", RAW)
@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/route"])
def test_bodies_that_cannot_be_read_are_refused(service: Service, case: str, path: str) -> None:
    response = service.client.post(path, content=RAW[case], headers=JSON)
    expect_error(response, 400)
    assert len(response.text) < 1000


def test_odd_text_is_answered_like_any_other(service: Service) -> None:
    for text in ("\x00\x01", "", "🦜" * 20, "‮abc", "<|im_end|>", " "):
        asked = body(messages=[{"role": "user", "content": text}], max_tokens=2)
        assert service.client.post(CHAT, json=asked).status_code == 200
    parts = [{"type": "text", "text": "Write a"}, {"type": "text", "text": " query"}]
    in_parts = body(messages=[{"role": "user", "content": parts}], user="me", metadata={"a": "b"})
    once = service.client.post(CHAT, json=body()).json()["choices"]
    assert service.client.post(CHAT, json=in_parts).json()["choices"] == once


def test_errors_repeat_neither_prompt_nor_path_nor_key(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    secret = "tell-nobody-of-this"
    asked = [
        body(messages=[{"role": "user", "content": secret * 600}], max_tokens=None),
        body(messages=[{"role": secret, "content": secret}]),
        body(model=secret),
        body(temperature=secret),
        body(stop=[secret] * 5),
    ]
    for one in asked:
        response = service.client.post(CHAT, json=one, headers={"authorization": secret})
        assert 400 <= response.status_code < 500
        assert secret not in response.text
        assert "/" not in response.json()["error"]["message"]
    assert secret not in caplog.text


def test_other_addresses_and_methods_are_refused_as_openai_does(service: Service) -> None:
    expect_error(service.client.get("/v1/embeddings"), 404)
    expect_error(service.client.get(CHAT), 405)
    expect_error(service.client.get("/ui/../keys.py"), 404)


def test_bodies_too_large_are_refused_before_they_are_read(service: Service) -> None:
    response = service.client.post(CHAT, content=b"x" * 10_000_000, headers=JSON)
    expect_error(response, 413, "1,048,576 bytes")

    def unannounced():
        for _ in range(100):
            yield b"x" * 100_000

    expect_error(service.client.post(CHAT, content=unannounced(), headers=JSON), 413)


def test_keys_are_asked_for_and_kept_as_hashes(service: Service, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    key, other = add_key(str(path), "laptop"), add_key(str(path), "phone")
    assert key not in path.read_text()
    assert path.stat().st_mode & 0o077 == 0
    keys = Keys(str(path))
    with client_of(service.replica, router=None, keys=keys) as client:
        for given in (None, "Bearer", "Bearer wrong", f"Basic {key}", f"Bearer {key}x", "Bearer é"):
            headers = {} if given is None else {"authorization": given.encode("latin-1")}
            expect_error(client.post(CHAT, json=body(), headers=headers), 401)  # pyright: ignore
            expect_error(client.get("/v1/models", headers=headers), 401)  # pyright: ignore
        for one in (key, other):
            headers = {"authorization": f"Bearer {one}"}
            assert client.post(CHAT, json=body(), headers=headers).status_code == 200
        assert client.get("/healthz").status_code == 200
        # Who is taken out of the file is let in no more, and who is put in is, at once.
        lines = path.read_text().splitlines(keepends=True)
        path.write_text(lines[0])
        new = add_key(str(path), "tablet")

        def status(given: str) -> int:
            headers = {"authorization": f"Bearer {given}"}
            return client.get("/v1/models", headers=headers).status_code

        assert [status(one) for one in (key, other, new)] == [200, 401, 200]
        for content in ("nobody\n", ""):
            path.write_text(content)
            assert status(key) == 401
        path.unlink()
        assert status(key) == 401
        path.write_text(lines[1])
        assert [status(one) for one in (key, other)] == [401, 200]


def test_without_keys_other_machines_names_and_forms_of_web_pages_are_refused(
    service: Service,
) -> None:
    for host in ("localhost:8000", "127.0.0.1", "127.0.0.9:1", "[::1]:8000"):
        assert service.client.get("/v1/models", headers={"host": host}).status_code == 200
    for host in ("evil.example:8000", "127.0.0.1.evil.example", "0.0.0.0", "[", ""):
        for path in ("/v1/models", "/", "/ui/page.js"):
            expect_error(service.client.get(path, headers={"host": host}), 421, "its own machine")
    content = json.dumps(body(max_tokens=1)).encode()
    for kind in (None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        headers = {} if kind is None else {"content-type": kind}
        expect_error(service.client.post(CHAT, content=content, headers=headers), 415, "JSON")
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    assert service.client.post(CHAT, content=content, headers=headers).status_code == 200


def test_with_keys_it_is_asked_by_any_name(service: Service, tmp_path: Path) -> None:
    key = add_key(str(tmp_path / "keys"), "laptop")
    headers = {"authorization": f"Bearer {key}", "host": "moie.example"}
    with client_of(service.replica, router=None, keys=Keys(str(tmp_path / "keys"))) as client:
        assert client.get("/v1/models", headers=headers).status_code == 200


def test_an_answer_is_sent_back_with_the_next_question_as_openais_client_does(
    service: Service,
) -> None:
    client = openai.OpenAI(
        base_url="http://127.0.0.1/v1",
        api_key="none",
        max_retries=0,
        http_client=service.client,  # pyright: ignore[reportArgumentType]
    )
    messages: list[Any] = [{"role": "user", "content": "Write a query"}]
    first = client.chat.completions.create(model="sums", messages=messages, max_tokens=3)
    messages += [first.choices[0].message, {"role": "user", "content": "And another"}]
    again = client.chat.completions.create(
        model="sums",
        messages=messages,
        max_tokens=3,
        tools=None,  # pyright: ignore[reportArgumentType]
        response_format={"type": "text"},
        extra_body={"tool_choice": None, "functions": None, "modalities": ["text"]},
    )
    assert again.usage is not None
    assert first.usage is not None
    assert again.usage.prompt_tokens > first.usage.prompt_tokens
    # What other servers' messages hold beside, though there is nothing in it.
    empty = {"refusal": "", "annotations": [], "tool_calls": [], "function_call": None}
    beside: list[Any] = [
        {"role": "assistant", "content": "x", "audio": None, **empty},
        {"role": "user", "content": "y"},
    ]
    client.chat.completions.create(model="sums", messages=beside, max_tokens=1)
    for something in ({"tool_calls": [{"id": "1"}]}, {"refusal": "no"}, {"audio": {"id": "1"}}):
        said = [{"role": "assistant", "content": "x", **something}, *HELLO]
        expect_error(service.client.post(CHAT, json=body(messages=said)), 400)


def test_without_a_router_nobody_can_ask_the_mixture(service: Service) -> None:
    with client_of(service.replica, router=None) as client:
        assert [m["id"] for m in client.get("/v1/models").json()["data"]][0] == "base"
        expect_error(client.post(CHAT, json=body(model="moie")), 404, "base, rivers, sums")
        expect_error(client.post("/v1/route", json={"messages": HELLO}), 404, "no router")


def test_what_is_too_much_is_refused_at_once_and_the_rest_is_answered(service: Service) -> None:
    asked = body(max_tokens=200, stop=["never said"])
    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        futures = [pool.submit(service.client.post, CHAT, json=asked) for _ in range(24)]
        answers = [future.result() for future in futures]
    refused = [one for one in answers if one.status_code == 429]
    answered = [one.json()["choices"] for one in answers if one.status_code == 200]
    assert len(refused) + len(answered) == 24
    assert refused
    assert len(answered) >= 4  # as many as may wait; more where rows were free by then
    assert all(one == answered[0] for one in answered)
    assert all(one.headers["retry-after"] == "1" for one in refused)
    expect_error(refused[0], 429, "ask again")
    assert service.replica._engine.load.rows == 0


def test_too_many_requests_in_progress_and_too_slow_ones_are_refused(service: Service) -> None:
    with client_of(service.replica, router=None, limits=HttpLimits(max_ongoing=0)) as client:
        response = client.post(CHAT, json=body())
        expect_error(response, 429, "in progress")
        assert response.headers["retry-after"] == "1"
    # It is refused before its body is read, and before anybody routes it.
    router = KeywordRouter({})
    with client_of(service.replica, router=router, limits=HttpLimits(max_ongoing=0)) as client:
        expect_error(client.post(CHAT, content=b"{", headers=JSON), 429, "in progress")
        expect_error(client.post(CHAT, json=body(model="moie")), 429, "in progress")
    assert not router.asked
    with client_of(service.replica, router=None, timeout_s=0.05) as client:
        expect_error(client.post(CHAT, json=body(max_tokens=450)), 504, "0.05 s")
        streamed = client.post(CHAT, json=body(max_tokens=450, stream=True))
        assert '"server_error"' in streamed.text
        assert "[DONE]" not in streamed.text
    wait_until_idle(service)


def wait_until_idle(service: Service) -> None:
    for _ in range(1200):
        if not service.replica._engine.load.rows:
            return
        time.sleep(0.05)
    raise AssertionError("what nobody waits for is still being answered")


def test_the_page_comes_with_a_policy_that_lets_nothing_else_in(service: Service) -> None:
    page = service.client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert '<script type="module" src="/ui/page.js">' in page.text
    assert "style=" not in page.text
    assert " on" + "click" not in page.text
    assert "http://" not in page.text.replace("http://www.w3.org", "")
    for path in ("/ui/page.js", "/ui/why.js", "/ui/page.css"):
        assert service.client.get(path).status_code == 200


def test_readiness_asks_the_engine(service: Service) -> None:
    assert service.client.get("/readyz").json() == {"status": "ready"}


def test_the_base_answers_for_whom_the_router_names_and_nobody_can_ask(service: Service) -> None:
    gone = "0" * 16
    router = KeywordRouter({"sums": gone, "rivers": service.ids["rivers"]})
    with client_of(service.replica, router=router) as client:
        messages = [{"role": "user", "content": "sums"}]
        told = client.post(CHAT, json=body(model="moie", messages=messages))
        assert told.headers["x-moie-route"] == "base"
        route = {"experts": [], "chosen_by": "router", "abstained": True, "reasons": []}
        assert told.json()["route"] == route | {"scores": {"rivers": 0.0}}
        both = [{"role": "user", "content": "sums and rivers"}]
        asked = body(model="moie", messages=both, moie={"top_k": 2})
        (one,) = client.post(CHAT, json=asked).json()["route"]["experts"]
        assert one == {"id": service.ids["rivers"], "name": "rivers", "weight": 1.0}


def test_a_stream_whose_client_is_gone_before_it_begins_leaves_its_place(service: Service) -> None:
    with client_of(service.replica, router=None, limits=HttpLimits(max_ongoing=1)) as client:
        content = json.dumps(body(max_tokens=400, stream=True)).encode()
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": "POST",
            "path": CHAT,
            "raw_path": CHAT.encode(),
            "query_string": b"",
            "headers": [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")],
        }

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": content, "more_body": False}

        async def send(_message: Any) -> None:
            raise OSError("the client is gone")

        with contextlib.suppress(OSError, ExceptionGroup, starlette.requests.ClientDisconnect):
            asyncio.run(client.app(scope, receive, send))  # pyright: ignore
        assert client.post(CHAT, json=body(max_tokens=1)).status_code == 200
    wait_until_idle(service)


def test_who_goes_while_a_ticket_is_handed_over_is_not_answered(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    tickets: list[Ticket] = []
    submit = service.replica._engine.submit

    def kept(ask: Ask, hand_over: Any) -> Ticket:
        tickets.append(submit(ask, hand_over))
        return tickets[-1]

    async def cancelled_as_it_comes(function: Any) -> None:
        function()
        raise asyncio.CancelledError

    monkeypatch.setattr(service.replica._engine, "submit", kept)
    monkeypatch.setattr(asyncio, "to_thread", cancelled_as_it_comes)
    question = Question("Write a query", (), (), Sampling(max_tokens=400))
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(service.replica.answer(question))
    (ticket,) = tickets
    assert ticket.cancelled
    wait_until_idle(service)


def test_logprobs_are_those_of_the_text_that_is_told(service: Service) -> None:
    asked = {"model": "base", "prompt": "Write a query", "temperature": 0, "logprobs": 1}
    whole = service.client.post("/v1/completions", json=asked | {"max_tokens": 40}).json()
    (choice,) = whole["choices"]
    # A stop string in the middle of what is said, longer than a token.
    stop = choice["text"][12:17]
    cut = choice["text"].index(stop)
    asked |= {"max_tokens": 40, "stop": [stop]}
    (stopped,) = service.client.post("/v1/completions", json=asked).json()["choices"]
    assert stopped["text"] == choice["text"][:cut]
    for one in (choice, stopped):
        given = one["logprobs"]
        assert len(given["text_offset"]) == len(given["tokens"]) == len(given["token_logprobs"])
        assert given["text_offset"] == sorted(given["text_offset"])
        assert 0 < len(given["tokens"]) <= 40
        for token, at in zip(given["tokens"], given["text_offset"], strict=True):
            assert at <= len(one["text"])
            if token.isascii() and at + len(token) <= len(one["text"]):
                assert one["text"][at:].startswith(token)
    assert all(at < cut for at in stopped["logprobs"]["text_offset"])
    assert len(choice["logprobs"]["tokens"]) == 40
    streamed = service.client.post("/v1/completions", json=asked | {"stream": True})
    parts = [one["choices"][0]["logprobs"] or {"text_offset": []} for one in events(streamed.text)]
    joined = [at for part in parts for at in part["text_offset"]]
    assert joined == stopped["logprobs"]["text_offset"]


def test_a_token_that_is_part_of_a_character_has_no_bytes_of_its_own(service: Service) -> None:
    asked = body(model="base", max_tokens=60, logprobs=True, temperature=2, seed=1)
    content = service.client.post(CHAT, json=asked).json()["choices"][0]["logprobs"]["content"]
    partial = [one for one in content if "\ufffd" in one["token"]]
    assert partial
    assert all(one["bytes"] is None for one in partial)
    assert all(
        bytes(one["bytes"]).decode() == one["token"] for one in content if one not in partial
    )


def test_what_went_wrong_is_logged_by_its_kind_alone(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", logger="serve.gateway")
    secret = "/data/somebody/experts"
    failed = told(RegistryError(f"{secret}/x is missing: restore it"), 1)
    assert failed.status == 503
    cause = ZeroDivisionError(secret)
    mistaken = told(RayTaskError("answer", f"Traceback: {secret}", cause), 1)
    assert mistaken.status == 500
    lost = told(RayActorError(), 1)
    assert lost.status == 503
    logged = [one for one in caplog.records if one.levelno >= logging.INFO]
    kinds = ("RegistryError", "ZeroDivisionError", "RayActorError")
    for error, kind, record in zip((failed, mistaken, lost), kinds, logged, strict=True):
        assert secret not in error.message
        text = logging.Formatter().format(record)
        assert secret not in text
        assert text.endswith(f"failed: {kind}")
    for error, record in zip((failed, mistaken), logged, strict=False):
        assert error.message.split("(request ")[1][:12] in record.getMessage()
    details = [one for one in caplog.records if one.levelno == logging.DEBUG]
    assert secret in logging.Formatter().format(details[0])
