"""What the tests of the service share: an engine with two experts, reached in this process."""

import asyncio
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from sae_ray.adapters.attach import AdapterSpec
from sae_ray.chat import Message
from sae_ray.experts.prototypes import ReadToken
from sae_ray.experts.registry import ExpertRegistry
from sae_ray.experts.router import Reason, Route
from serve.deployments import EngineReplica, RouterReplica
from serve.gateway import Backends, Gateway
from serve.keys import Keys
from serve.meters import Meters
from serve.routes import HttpLimits, Ingress, create_app
from tests.made_experts import add_expert


class KeywordRouter:
    """Routes by a word of the last message, where a test is about what is made of a route."""

    def __init__(self, ids: Mapping[str, str]) -> None:
        self.ids = ids
        self.asked = 0

    async def route(self, messages: Sequence[Message], previous: str | None, top_k: int) -> Route:
        self.asked += 1
        await asyncio.sleep(0)
        said = messages[-1]["content"]
        found = [id for name, id in self.ids.items() if name in said]
        if not found and previous is not None and previous in self.ids.values():
            found = [previous]
        found = found[:top_k]
        return Route(
            expert_ids=tuple(found),
            weights=tuple(1 / len(found) for _ in found),
            reasons=(Reason(7, "says the word", 0.5),) if found else (),
            scores={id: float(id in found) for id in self.ids.values()},
            abstained=not found,
        )

    async def read(self, messages: Sequence[Message], latents: Sequence[int]) -> list[ReadToken]:
        words = messages[-1]["content"].split()
        return [ReadToken(word, {n: 2.0 for n in latents if word in self.ids}) for word in words]


@dataclasses.dataclass
class Service:
    """The service in this process."""

    replica: EngineReplica
    client: TestClient
    ids: dict[str, str]


@pytest.fixture(scope="session")
def served_registry(
    tmp_path_factory: pytest.TempPathFactory, tiny_lm_of: Callable[[str], Path]
) -> str:
    """A registry of two experts on the tiny Llama."""
    registry = ExpertRegistry(str(tmp_path_factory.mktemp("served") / "registry"))
    for seed, name in enumerate(("sums", "rivers")):
        spec = AdapterSpec(kind="lora", r=2)
        add_expert(registry, name, spec, lm=str(tiny_lm_of("llama")), seed=seed)
    return registry.path


def client_of(
    replica: EngineReplica,
    *,
    router: KeywordRouter | RouterReplica | None,
    keys: Keys | None = None,
    limits: HttpLimits | None = None,
    timeout_s: float = 30,
) -> TestClient:
    """Return a client of the HTTP API over an engine in this process."""
    meters = Meters()
    backends = Backends(
        experts=replica.experts,
        answer=replica.answer,
        stream=replica.stream,
        route=router and router.route,
        read=router and router.read,
    )
    gateway = Gateway(backends, meters, timeout_s=timeout_s)
    ingress = Ingress(gateway, keys or Keys(), limits or HttpLimits(), meters)
    app = create_app(ingress)
    return TestClient(app, "http://127.0.0.1", raise_server_exceptions=False)


@pytest.fixture(scope="session")
def service(served_registry: str, tiny_lm_of: Callable[[str], Path]) -> Iterator[Service]:
    """An engine of four rows, a router by keywords, and a client."""
    limits = {"max_rows": 4, "max_waiting": 4, "prefill_tokens": 512, "adapter_memory_mb": 10.0}
    lm = str(tiny_lm_of("llama"))
    replica = EngineReplica(lm, served_registry, limits, "float32", "cpu", 0.2, 1)
    ids = asyncio.run(replica.experts())
    with client_of(replica, router=KeywordRouter(ids)) as client:
        yield Service(replica, client, ids)
    replica.close()
