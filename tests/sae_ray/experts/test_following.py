import logging
from collections.abc import Mapping
from pathlib import Path

import pytest

from sae_ray.adapters.attach import AdapterSpec
from sae_ray.curate.block import IndexBlock
from sae_ray.experts.following import Follower
from sae_ray.experts.prototypes import Eyes, encode
from sae_ray.experts.registry import Expert, ExpertRegistry
from sae_ray.experts.router import Router
from tests.made_experts import add_expert

Blocks = Mapping[str, IndexBlock]


@pytest.fixture
def registry(tmp_path: Path) -> ExpertRegistry:
    return ExpertRegistry(str(tmp_path / "experts"))


def add(registry: ExpertRegistry, eyes: Eyes, blocks: Blocks, name: str, seed: int = 0) -> Expert:
    known = encode(eyes, blocks[name].take(range(40)))
    return add_expert(registry, name, AdapterSpec(kind="lora", r=2), seed=seed, prototypes=known)


def router_of(eyes: Eyes, blocks: Blocks, background: IndexBlock, *experts: Expert) -> Router:
    known = {one.id: (one.card.name, "", blocks[one.card.name].take(range(40))) for one in experts}
    return Router.fit(eyes, known, background, kind="knn")


def known(follower: Follower) -> set[str]:
    return {one.id for one in follower.router.experts}


def test_who_comes_into_use_is_routed_to_and_who_goes_out_is_not(
    registry: ExpertRegistry, eyes: Eyes, blocks: Blocks, background: IndexBlock
) -> None:
    first, other = (add(registry, eyes, blocks, name) for name in ("order", "velan"))
    follower = Follower(router_of(eyes, blocks, background, first, other), registry)
    follower.look()
    untouched = follower.router
    follower.look()
    assert follower.router is untouched
    again, sums = add(registry, eyes, blocks, "order", 1), add(registry, eyes, blocks, "sums")
    registry.retire(other.id)
    follower.look()
    assert known(follower) == {again.id, sums.id}  # a new version stands in for the old one
    held = blocks["sums"].take(range(40, 60))
    numbers = [one.id for one in follower.router.experts]
    best = follower.router.scores(held).argmax(1)
    assert sum(numbers[i] == sums.id for i in best) >= 15


def test_what_cannot_be_followed_is_said_once(
    registry: ExpertRegistry,
    eyes: Eyes,
    blocks: Blocks,
    background: IndexBlock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    first = add(registry, eyes, blocks, "order")
    follower = Follower(router_of(eyes, blocks, background, first), registry)
    bare = add_expert(registry, "bare", AdapterSpec(kind="lora", r=2))
    registry.retire(first.id)
    with caplog.at_level(logging.WARNING):
        follower.look()
        follower.look()
    assert known(follower) == {first.id}  # of nobody there is no router
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert any("nothing is routed to bare@1" in one for one in said)
    assert any(f"the retired order ({first.id})" in one for one in said)
    registry.retire(bare.id)
    back = registry.activate(first.id)
    follower.look()
    assert known(follower) == {back.id}


def test_a_router_that_is_trained_stays_and_says_so(
    registry: ExpertRegistry,
    eyes: Eyes,
    blocks: Blocks,
    background: IndexBlock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    first = add(registry, eyes, blocks, "order")
    blocks_of = {first.id: ("order", "", blocks["order"].take(range(40)))}
    router = Router.fit(eyes, blocks_of, background, kind="logistic")
    follower = Follower(router, registry)
    add(registry, eyes, blocks, "sums")
    with caplog.at_level(logging.WARNING):
        follower.look()
        follower.look()
    assert follower.router is router
    (said,) = [record.getMessage() for record in caplog.records]
    assert "nothing is routed to sums@1: a logistic router is trained on all" in said
