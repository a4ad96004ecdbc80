import dataclasses
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from sae_ray import tiny
from sae_ray.artifacts import verify
from sae_ray.curate.block import IndexBlock
from sae_ray.errors import ArtifactError, ConfigError, RegistryError
from sae_ray.experts.fitting import Kind
from sae_ray.experts.prototypes import Eyes
from sae_ray.experts.router import BASE, Router
from sae_ray.sae.labels import read_labels

DOMAINS = ("velan", "order", "sums", "tone")
KINDS: tuple[Kind, ...] = ("zero_shot", "knn", "logistic")
NUM_KNOWN = 40
Prompts = Mapping[str, list[str]]
Blocks = Mapping[str, IndexBlock]


def fitted(
    eyes: Eyes, blocks: Blocks, background: IndexBlock, kind: Kind, names: tuple = DOMAINS
) -> Router:
    known = {f"id-{one}": (one, one, blocks[one].take(range(NUM_KNOWN))) for one in names}
    labels = read_labels(tiny.labels_path(), tiny.sae_path())
    return Router.fit(eyes, known, background, kind=kind, labels=labels)


def asked(text: str, *before: tuple[str, str]) -> list[dict[str, str]]:
    turns = [
        (role, said)
        for pair in before
        for role, said in zip(("user", "assistant"), pair, strict=True)
    ]
    return [{"role": role, "content": said} for role, said in (*turns, ("user", text))]


@pytest.fixture(scope="module")
def routers(eyes: Eyes, blocks: Blocks, background: IndexBlock) -> Mapping[Kind, Router]:
    return {kind: fitted(eyes, blocks, background, kind) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_reach_the_expert_that_knows_and_others_stay(
    routers: Mapping[Kind, Router], prompts: Prompts, kind: Kind
) -> None:
    router = routers[kind]
    for domain in DOMAINS:
        routes = router.route_many([asked(text) for text in prompts[domain][NUM_KNOWN:]])
        right = [route.expert_ids == (f"id-{domain}",) for route in routes]
        assert np.mean(right) >= 0.8, domain
    left_out = router.route_many([asked(text) for text in prompts["cooking"]])
    assert np.mean([route.abstained for route in left_out]) >= 0.85
    assert all((route.expert_ids == ()) == route.abstained for route in left_out)


@pytest.mark.parametrize("kind", KINDS)
def test_a_router_is_loaded_back_equal_and_no_other_model_reads_for_it(
    routers: Mapping[Kind, Router], prompts: Prompts, kind: Kind, tmp_path: Path
) -> None:
    router, place = routers[kind], str(tmp_path / "router")
    router.save(place, "embedded", "embedded")
    verify(place)
    assert {one.suffix for one in (tmp_path / "router").iterdir()} == {".json", ".safetensors"}
    again = Router.load(place)
    conversations = [asked(prompts[domain][-1]) for domain in (*DOMAINS, "rewriting", "manners")]
    assert again.route_many(conversations, top_k=2) == router.route_many(conversations, top_k=2)
    stated = json.loads((tmp_path / "router/manifest.json").read_text())
    stated["parents"]["sae"] = "0" * 64
    (tmp_path / "router/manifest.json").write_text(json.dumps(stated))
    with pytest.raises(ArtifactError, match="another sae than"):
        Router.load(place)


@pytest.mark.parametrize("kind", ["zero_shot", "knn"])
def test_experts_come_and_go_without_touching_the_decisions_of_others(
    eyes: Eyes, routers: Mapping[Kind, Router], blocks: Blocks, background: IndexBlock, kind: Kind
) -> None:
    router = routers[kind]
    others = IndexBlock.concatenate([blocks[one] for one in (*DOMAINS[:-1], "days", "manners")])
    without = router.retire("id-tone")
    assert [one.name for one in without.experts] == list(DOMAINS[:-1])

    def who(one: Router) -> list[str]:
        scores = one.scores(others)
        ids = [*(expert.id for expert in one.experts), BASE]
        return [ids[i] for i in np.where(scores.max(1) >= 0, scores.argmax(1), len(ids) - 1)]

    before, after = who(router), who(without)
    changed = [a != b for a, b in zip(before, after, strict=True) if a != "id-tone"]
    assert np.mean(changed) < 0.01
    back = without.add("id-tone", "tone", "tone", blocks["tone"].take(range(NUM_KNOWN)))
    assert np.array_equal(back.scores(others), router.scores(others))
    with pytest.raises(RegistryError, match="none of the router's"):
        router.retire("id-nobody")


def test_many_threads_route_as_one_does(routers: Mapping[Kind, Router], prompts: Prompts) -> None:
    texts = [text for domain in DOMAINS for text in prompts[domain][NUM_KNOWN:][:6]]
    texts = [text * (1 + k % 3) for k, text in enumerate(texts)]  # of different lengths
    router = routers["knn"]
    alone = [router.route(asked(text)) for text in texts]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(router.route, map(asked, texts)))
    for one, other in zip(alone, together, strict=True):
        assert one.expert_ids == other.expert_ids
        assert one.scores == pytest.approx(other.scores, abs=1e-6)


def test_a_logistic_router_must_be_fitted_again(routers: Mapping[Kind, Router]) -> None:
    with pytest.raises(ConfigError, match="fit it again"):
        routers["logistic"].retire("id-tone")


def test_no_more_of_the_background_leaves_the_base_than_is_allowed(
    eyes: Eyes, blocks: Blocks, background: IndexBlock
) -> None:
    # Half of this background is an expert's own kind of prompt: its threshold alone must give way.
    own = blocks["order"].take(range(NUM_KNOWN, 60))
    hard = IndexBlock.concatenate([background, own, own.take(range(20))])
    hard = hard.take(np.random.default_rng(1).permutation(len(hard)))
    router = fitted(eyes, blocks, hard, "zero_shot")
    held = hard.take(np.arange(1, len(hard), 2))
    assert np.mean(router.scores(held).max(1) >= 0) <= 0.05
    raised = dict(zip(DOMAINS, router.fitted.thresholds, strict=True))
    assert raised["order"] > max(one for name, one in raised.items() if name != "order"), raised
    mixed = Router.fit(
        eyes, {"id": ("order", "", blocks["order"].take(range(NUM_KNOWN)))}, hard, mixed=True
    )
    assert mixed.fitted.thresholds[0] < raised["order"] / 2
    assert len(mixed.background) < len(hard)


@pytest.mark.parametrize("kind", KINDS)
def test_a_reason_is_what_the_prompt_would_lose_without_the_latent(
    routers: Mapping[Kind, Router], blocks: Blocks, kind: Kind
) -> None:
    router = routers[kind]
    block = blocks["velan"].take([50])
    (route,) = router.route_many([asked("")])  # nothing to read: the base, and no reasons
    assert (route.abstained, route.reasons) == (True, ())
    latents, each = router.contributions(block, 0, 0)
    raw = (block.hidden_mean()[0] - router.space.mean) @ router.space.basis
    pull, length = router.fitted.pull(raw / np.linalg.norm(raw), 0), np.linalg.norm(raw)
    decoder = router.eyes.scorer.encoder.W_dec.numpy()
    strongest = int(np.abs(each).argmax())
    latent = latents[strongest]
    change = block.pooled("mean").toarray()[0, latent] - router.latent_means[latent]
    hidden = block.hidden_mean()[0] - change * decoder[latent]
    without = (hidden - router.space.mean) @ router.space.basis
    assert each[strongest] == pytest.approx((raw - without) @ pull / length, rel=1e-3, abs=1e-5)


def test_reasons_speak_for_the_expert_or_against_the_nearest(
    routers: Mapping[Kind, Router], prompts: Prompts
) -> None:
    route = routers["knn"].route(asked(prompts["velan"][50]))
    assert route.expert_ids == ("id-velan",)
    assert "translation into Velan" in {one.label for one in route.reasons}
    assert all(one.contribution > 0 for one in route.reasons)
    assert sum(route.scores.values()) == pytest.approx(1)
    assert max(route.scores, key=lambda id: route.scores[id]) == "id-velan"
    assert 0 < route.margin <= 1
    stays = routers["knn"].route(asked(prompts["manners"][50]))
    assert stays.abstained
    assert max(stays.scores, key=lambda id: stays.scores[id]) == BASE
    assert all(one.contribution < 0 for one in stays.reasons)


def test_who_answered_before_stays_while_it_is_nearly_as_good(
    routers: Mapping[Kind, Router], prompts: Prompts, eyes: Eyes
) -> None:
    router = routers["knn"]
    (text,) = prompts["velan"][50:51]
    scores = router.scores(eyes.read([text]))[0]

    # Thresholds that leave this prompt just short of its expert: alone it stays with the base.
    def short_by(gap: float) -> Router:
        thresholds = router.fitted.thresholds + scores + np.float32(gap)
        changed = dataclasses.replace(router.fitted, thresholds=thresholds)
        return Router(
            eyes,
            router.space,
            router.latent_means,
            router.background,
            router.experts,
            changed,
            router.labels,
        )

    near, far = short_by(0.1), short_by(0.5)
    assert near.route(asked(text)).abstained
    assert near.route(asked(text), previous="id-velan").expert_ids == ("id-velan",)
    assert near.route(asked(text), previous="id-gone").abstained
    assert far.route(asked(text), previous="id-velan").abstained
    # Earlier requests of the conversation say who answered before, where nobody else does.
    first = asked(text, (prompts["order"][50], "1, 2, 3"))
    replayed = router.route_many([first])[0].scores["id-order"]
    assert replayed > router.route(asked(text)).scores["id-order"]
    # An expert that is gone says nothing, and those before it are routed again.
    stale = router.route(first, previous="id-gone")
    assert stale.scores["id-order"] == pytest.approx(replayed, abs=1e-6)


def test_more_experts_answer_only_where_the_base_is_not_ahead_of_them(
    routers: Mapping[Kind, Router], prompts: Prompts
) -> None:
    router = routers["knn"]
    two = router.route(asked(prompts["velan"][50]), top_k=2)
    assert two.expert_ids[0] == "id-velan"
    assert sum(two.weights) == pytest.approx(1)
    assert all(two.scores[id] >= two.scores[BASE] for id in two.expert_ids)
    for top_k in (0, 5):
        with pytest.raises(ConfigError, match=r"router knows 4 experts \(velan, order"):
            router.route(asked("Hello"), top_k=top_k)


def test_system_turns_and_replies_do_not_decide(
    routers: Mapping[Kind, Router], prompts: Prompts
) -> None:
    router, text = routers["knn"], prompts["sums"][50]
    plain = router.route(asked(text))
    system = [{"role": "system", "content": prompts["velan"][50]}, *asked(text)]
    assert router.route(system).expert_ids == plain.expert_ids == ("id-sums",)
    for nothing in ([], [{"role": "system", "content": "Hello"}], asked("")):
        assert router.route(nothing).scores[BASE] == 1


def test_too_few_prompts_are_refused(eyes: Eyes, blocks: Blocks, background: IndexBlock) -> None:
    few = {"id": ("velan", "", blocks["velan"].take(range(5)))}
    with pytest.raises(RegistryError, match="velan has 5 prompts"):
        Router.fit(eyes, few, background)
    with pytest.raises(RegistryError, match="no expert to route to"):
        Router.fit(eyes, {}, background)
    known = {"id": ("velan", "", blocks["velan"])}
    with pytest.raises(RegistryError, match="background holds 10 prompts"):
        Router.fit(eyes, known, background.take(range(10)))
