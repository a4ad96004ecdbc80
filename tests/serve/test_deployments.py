import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from starlette.testclient import TestClient

from sae_ray import tiny
from sae_ray.adapters.attach import AdapterSpec
from sae_ray.experts.prototypes import Eyes, draw_prompts, encode, requests
from sae_ray.experts.registry import ExpertRegistry
from sae_ray.experts.router import Router
from serve.deployments import EngineReplica, RouterReplica
from tests.made_experts import add_expert
from tests.serve.conftest import client_of

LIMITS = {"max_rows": 4, "max_waiting": 4, "prefill_tokens": 512, "adapter_memory_mb": 10.0}
RELOAD_S = 0.2


@dataclasses.dataclass(frozen=True)
class Mixture:
    client: TestClient
    registry: ExpertRegistry
    eyes: Eyes
    prompts: dict[str, list[str]]

    def add(self, name: str, seed: int) -> str:
        known = encode(self.eyes, self.eyes.read(self.prompts[name][:40]))
        spec = AdapterSpec(kind="lora", r=2)
        return add_expert(self.registry, name, spec, seed=seed, prototypes=known).id

    def ask(self, text: str) -> dict:
        asked = {"model": "moie", "messages": [{"role": "user", "content": text}], "max_tokens": 2}
        response = self.client.post("/v1/chat/completions", json=asked)
        assert response.status_code == 200, response.text
        return response.json()["route"]

    def wait_for(self, text: str, *ids: str) -> dict:
        until = time.monotonic() + 60
        while True:
            told = self.ask(text)
            if [one["id"] for one in told["experts"]] == list(ids):
                return told
            assert time.monotonic() < until, told
            time.sleep(RELOAD_S)


@pytest.fixture
def mixture(tmp_path: Path) -> Iterator[Mixture]:
    """A real router and a real engine over the embedded base, with no experts but one."""
    prompts: dict[str, list[str]] = {}
    for row in pq.read_table(tiny.pool_path(), columns=["domain", "messages"]).to_pylist():
        prompts.setdefault(row["domain"], []).extend(requests(row["messages"])[-1:])
    eyes, registry = Eyes.open("embedded", "embedded"), ExpertRegistry(str(tmp_path / "experts"))
    setting = Mixture(None, registry, eyes, prompts)  # pyright: ignore
    id = setting.add("velan", 0)
    background = eyes.read(draw_prompts(str(tiny.pool_path()), 300))
    velan = ("velan", "", eyes.read(prompts["velan"][:40]))
    router = Router.fit(eyes, {id: velan}, background, mixed=True)
    router.save(str(tmp_path / "router"), "embedded", "embedded")
    before = torch.get_num_threads()
    engine = EngineReplica(None, registry.path, LIMITS, "float32", "cpu", RELOAD_S, 3)
    assert torch.get_num_threads() == 3
    chooser = RouterReplica(str(tmp_path / "router"), None, None, registry.path, RELOAD_S, 2)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)
    with client_of(engine, router=chooser) as client:
        yield dataclasses.replace(setting, client=client)
    chooser.close()
    engine.close()


def test_a_running_mixture_follows_its_registry(mixture: Mixture) -> None:
    velan = mixture.registry.find("velan").id
    text = mixture.prompts["velan"][50]
    told = mixture.wait_for(text, velan)
    assert told["reasons"]
    # A new version takes the place of the old one, also in what is routed.
    new = mixture.add("velan", 1)
    told = mixture.wait_for(text, new)
    assert set(told["scores"]) == {"velan", "base"}
    # A new expert is routed to, though the router was fitted without it.
    order = mixture.add("order", 2)
    mixture.wait_for(mixture.prompts["order"][50], order)
    mixture.registry.retire(new)
    told = mixture.wait_for(text)
    assert told["abstained"]
    assert set(told["scores"]) == {"order", "base"}
    # Of nobody there is no router: it keeps the last one, and the base answers.
    mixture.registry.retire(order)
    told = mixture.wait_for(mixture.prompts["order"][50])
    assert (told["abstained"], told["reasons"], set(told["scores"])) == (True, [], {"base"})


def test_more_experts_than_there_are_is_told_to_who_asks(mixture: Mixture) -> None:
    asked = {"messages": [{"role": "user", "content": "x"}], "moie": {"top_k": 2}}
    response = mixture.client.post("/v1/route", json=asked)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "moie.top_k"
