"""The API under requests that nobody thought of, made from its own OpenAPI document."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from starlette.testclient import TestClient

from serve.routes import HttpLimits
from tests.serve.conftest import KeywordRouter, Service, client_of

# Schemathesis 4.32 draws by itself in a place where Hypothesis would rather have it asked.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")

MODELS = ("sums", "base", "moie")
TOLD = {200, 400, 404, 405, 413, 415}
"""Never 5xx; and never 429, of a service with one place that is asked one thing at a time."""
VALID = {"model": "sums", "max_tokens": 2, "temperature": 0, "top_p": 0.5, "seed": 1, "stop": ["x"]}
VALID |= {"stream": True, "stream_options": {"include_usage": True}, "user": "me", "n": 1}
VALID |= {"moie": {"previous": "x", "top_k": 1}, "metadata": {"a": "b"}, "store": False}
SAID = [{"role": "user", "content": [{"type": "text", "text": "Write"}], "name": "me"}]
EXAMPLES = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),  # pyright: ignore[reportArgumentType]
)
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {**VALID, "messages": SAID, "logprobs": True, "top_logprobs": 2},
    "/v1/completions": {**VALID, "prompt": [5, 6, 7], "logprobs": 2},
    "/v1/route": {"messages": SAID, "moie": {"previous": "x", "top_k": 1}},
}


def nested(depth: int) -> list:
    inner: list = []
    for _ in range(depth):
        inner = [inner]
    return inner


ODD: tuple[Any, ...] = (
    *(None, True, 0, -1, 1.5, 2**63, 10**30, -(10**30), 1e308, float("inf"), float("nan")),
    *("", "x", "\0", "\ud800", "9" * 5000, [], {}, [None], [[]], ["x"], {"a": 1}, [0] * 600),
    *([-1], [10**30], [True], nested(400), {"\0": nested(50)}),
)


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[TestClient]:
    """A client of a service with one place: who is not let go of keeps all others out."""
    limits = HttpLimits(max_ongoing=1)
    with client_of(service.replica, router=KeywordRouter(service.ids), limits=limits) as client:
        yield client


@pytest.fixture(scope="module")
def api(client: TestClient) -> Any:
    return schemathesis.openapi.from_dict(client.get("/openapi.json").json())


def require_sound(response: Any) -> None:
    """Refuse anything but an answer, or an error as OpenAI tells it."""
    assert response.status_code in TOLD, (response.status_code, response.text)
    if response.status_code != 200:
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"]
        assert len(response.text) < 1000


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_what_the_document_allows_and_what_it_does_not(
    client: TestClient, api: Any, mode: GenerationMode
) -> None:
    def ask(case: schemathesis.Case) -> None:
        if isinstance(case.body, dict) and "model" in case.body:
            case.body.setdefault("max_tokens", 2)  # else each answer is as long as the context
            given = case.body["model"]
            if isinstance(given, str):
                known = (*MODELS, given)  # a name at random is nobody's
                case.body["model"] = known[len(given) % len(known)]
        asked = case.as_transport_kwargs(base_url="http://127.0.0.1")
        asked.pop("cookies", None)
        if isinstance(asked.get("data"), str | bytes):  # httpx has another name for it
            asked["content"] = asked.pop("data")
        response = client.request(**asked)
        require_sound(response)
        seen.add((case.operation.label, response.status_code))

    seen: set[tuple[str, int]] = set()
    for operation in (one.ok() for one in api.get_all_operations()):
        if mode is GenerationMode.NEGATIVE and operation.method == "get":
            continue  # there is nothing to get wrong
        EXAMPLES(given(operation.as_strategy(generation_mode=mode))(ask))()
    asked = {f"POST {path}" for path in BODIES}
    if mode is GenerationMode.POSITIVE:
        assert asked <= {label for label, status in seen if status == 200}
    else:
        assert asked <= {label for label, status in seen if status == 400}


def places(value: Any, place: tuple = ()) -> Iterator[tuple]:
    """Yield the place of every value inside one."""
    inside = value.items() if isinstance(value, dict) else enumerate(value)
    for key, one in inside:
        yield (*place, key)
        if isinstance(one, dict | list):
            yield from places(one, (*place, key))


@pytest.mark.parametrize("path", BODIES)
def test_any_value_in_any_place(client: TestClient, path: str) -> None:
    for place in [(), *places(BODIES[path])]:
        for odd in ODD:
            body: Any = {"": json.loads(json.dumps(BODIES[path]))}
            inside: Any = body
            *before, last = ("", *place)
            for key in before:
                inside = inside[key]
            inside[last] = odd
            content = json.dumps(body[""]).encode()
            require_sound(
                client.post(path, content=content, headers={"content-type": "application/json"})
            )
    assert client.post(path, json=BODIES[path]).status_code == 200
