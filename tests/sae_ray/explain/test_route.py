"""Routes explained: what is told is what the router decides, and prompts stay text."""

import html
import re

import pytest

from sae_ray.experts.router import BASE, Router
from sae_ray.explain.route import ExplainedRoute, RoutePage, explained, render
from tests.made_router import KNOWN, NOBODYS, SORT, make_router

MARKUP = f"{SORT} <script>alert(1)</script>"


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> Router:
    return make_router(str(tmp_path_factory.mktemp("made") / "router"))


def page_of(router: Router, *routes: ExplainedRoute) -> RoutePage:
    about = [(one.id, one.name, one.description) for one in router.experts]
    return RoutePage(router.fitted.kind, "0" * 64, about, routes)


@pytest.mark.parametrize("prompt", [SORT, MARKUP, NOBODYS])
@pytest.mark.parametrize("top_k", [1, 2])
def test_what_is_told_is_what_the_router_decides(router: Router, prompt: str, top_k: int) -> None:
    route = router.route([{"role": "user", "content": prompt}], top_k=top_k)
    told = explained(router, prompt, top_k=top_k).to_json()
    assert told["abstained"] == route.abstained == (prompt == NOBODYS)
    assert [one["id"] for one in told["experts"]] == list(route.expert_ids)
    assert [one["weight"] for one in told["experts"]] == list(route.weights)
    assert {one["id"]: one["probability"] for one in told["scores"]} == {
        id: one for id, one in route.scores.items() if id != BASE
    }
    assert told["base_probability"] == route.scores[BASE]
    assert [(one["latent"], one["label"], one["contribution"]) for one in told["reasons"]] == [
        (one.latent, one.label, one.contribution) for one in route.reasons
    ]
    # Scores and thresholds are those that it was decided by.
    over = {one["id"] for one in told["scores"] if one["score"] >= one["threshold"]}
    assert bool(over) != route.abstained
    assert set(route.expert_ids) <= over
    leads = [one["score"] - one["threshold"] for one in told["scores"]]
    assert leads == sorted(leads, reverse=True)
    thresholds = {one["id"]: one["threshold"] for one in told["scores"]}
    assert list(map(thresholds.get, KNOWN.values())) == router.fitted.thresholds.tolist()


def test_words_say_who_answers_and_by_which_scores(router: Router) -> None:
    sent, stays = explained(router, SORT), explained(router, NOBODYS)
    first, near = sent.standings[0], stays.standings[0]
    assert sent.decision == "Sent to order"
    assert sent.why.startswith(f"order has a score of {first.score:.2f} against")
    assert sent.case == "What was read that speaks for order:"
    assert all(one.contribution > 0 for one in sent.route.reasons)
    assert stays.decision == "The base answers"
    assert f"{near.name} comes nearest, with a score of {near.score:.2f} against" in stays.why
    assert stays.case == f"What was read against {near.name}, which came nearest:"
    assert all(one.contribution < 0 for one in stays.route.reasons)
    assert page_of(router, sent).summary == f"{sent.decision}: {sent.why}"
    assert page_of(router, sent, stays).summary.endswith(
        "1 sent to experts, 1 answered by the base."
    )


def test_tokens_are_shaded_where_reasons_are_on_and_show_the_prompt(router: Router) -> None:
    one = explained(router, MARKUP)
    latents = {reason.latent for reason in one.route.reasons}
    assert latents
    assert "".join(token.text for token in one.tokens) == MARKUP
    assert set().union(*(token.activations for token in one.tokens)) == latents
    assert html.unescape(re.sub(r"</?mark[^>]*>", "", one.shaded)) == MARKUP
    assert "<script" not in one.shaded
    peak = {n: max(token.activations.get(n, 0.0) for token in one.tokens) for n in latents}
    on = "".join(
        token.text.strip()
        for token in one.tokens
        if any(z >= 0.1 * peak[n] for n, z in token.activations.items())
    )
    marked = "".join(re.findall(r"<mark[^>]*>(.*?)</mark>", one.shaded, re.DOTALL))
    assert html.unescape(marked).replace(" ", "") == on.replace(" ", "")
    for reason in one.route.reasons:
        assert one.strongest(reason.latent)[0][1] == peak[reason.latent]


def test_of_a_long_prompt_what_was_not_read_is_counted_and_not_shown(router: Router) -> None:
    one = explained(router, "Once upon a time. " * 2000 + SORT)
    shown = html.unescape(re.sub(r"</?mark[^>]*>", "", one.shaded))
    assert one.num_unread == len(one.prompt) - len(shown) > 0
    assert one.prompt.endswith(shown)
    page = render(page_of(router, one))
    assert f"The first {one.num_unread:,} characters of the prompt were not read" in page


def test_where_nothing_can_be_read_the_base_answers(router: Router) -> None:
    one = explained(router, "")
    told = one.to_json()
    assert (told["abstained"], told["base_probability"]) == (True, 1.0)
    assert {expert["score"] for expert in told["scores"]} == {None}
    assert told["why"] == "nothing in the prompt could be read."
    assert "There is no latent to name." in render(page_of(router, one))


def test_the_page_says_what_the_json_says_and_markup_stays_text(router: Router) -> None:
    routes = [explained(router, MARKUP), explained(router, NOBODYS)]
    page = page_of(router, *routes)
    shown = render(page)
    assert "<script" not in shown
    assert "<i>" not in shown
    assert "About &lt;i&gt;order&lt;/i&gt;" in shown
    said = html.unescape(shown)
    for told in page.to_json()["routes"]:
        assert f">{told['decision']}</h2>" in said
        assert f"Why: {told['why']}</p>" in said
        assert told["case"] in said
        for reason in told["reasons"]:
            assert f'{reason["label"]} <span class="muted">{reason["latent"]}</span>' in said
            assert f">{reason['contribution']:+.4f}</td>" in said
        for one in told["scores"]:
            numbers = f'">{one["score"]:.2f}</td><td class="num">{one["threshold"]:.2f}</td>'
            assert f'{numbers}<td class="num">{100 * one["probability"]:.1f} %</td>' in said
        assert f">{100 * told['base_probability']:.1f} %</td>" in said
