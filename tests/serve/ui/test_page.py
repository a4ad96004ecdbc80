"""The page in a real headless Chromium, before a real engine and a real router."""

import functools
import json
import os
import shutil
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow.parquet as pq
import pytest
import uvicorn
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Locator, Page, Route, expect, sync_playwright

from sae_ray import tiny
from sae_ray.adapters.attach import AdapterSpec
from sae_ray.experts.prototypes import Eyes, requests
from sae_ray.experts.registry import ExpertRegistry
from sae_ray.experts.router import Router
from sae_ray.sae.labels import read_labels
from serve.deployments import EngineReplica, RouterReplica
from serve.gateway import Backends, Gateway
from serve.keys import Keys, add_key
from serve.meters import Meters
from serve.routes import HttpLimits, Ingress, create_app
from tests.made_experts import add_expert

CHROMIUM = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))),
    None,
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CHROMIUM is None,
        reason="no Chromium: neither in the environment's CHROMIUM nor on PATH as chromium, "
        "chromium-browser, google-chrome or chrome",
    ),
]

DOMAINS, NOBODYS = ("velan", "order"), ("small_talk", "manners", "rewriting", "kinds")
NUM_PROMPTS = 60
WATCH = """
window.violations = [];
document.addEventListener("securitypolicyviolation",
    (event) => violations.push(event.violatedDirective + " " + event.blockedURI));
"""
Prompts = Mapping[str, list[str]]


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    """Last requests of some domains of the embedded pool."""
    found: dict[str, list[str]] = {one: [] for one in (*DOMAINS, *NOBODYS)}
    for row in pq.read_table(tiny.pool_path(), columns=["domain", "messages"]).to_pylist():
        if len(mine := found.get(row["domain"], [])) < NUM_PROMPTS:
            mine += requests(row["messages"])[-1:]
    return found


@pytest.fixture(scope="module")
def backends(tmp_path_factory: pytest.TempPathFactory, prompts: Prompts) -> Iterator[Backends]:
    """An engine with two experts on the embedded model, and a router between them."""
    folder = tmp_path_factory.mktemp("page")
    registry = ExpertRegistry(str(folder / "registry"))
    spec = AdapterSpec(kind="lora", r=2)
    experts = [add_expert(registry, one, spec, seed=i, size=0.05) for i, one in enumerate(DOMAINS)]
    eyes = Eyes.open("embedded", "embedded")
    nobodys = eyes.read([text for one in NOBODYS for text in prompts[one]])
    nobodys = nobodys.take(np.random.default_rng(0).permutation(len(nobodys)))
    known = {
        one.id: (one.card.name, one.card.description, eyes.read(prompts[one.card.name][:40]))
        for one in experts
    }
    labels = read_labels(tiny.labels_path(), tiny.sae_path())
    router = Router.fit(eyes, known, nobodys, labels=labels)
    router.save(str(folder / "router"), "embedded", "embedded")
    limits = {"max_rows": 4, "max_waiting": 4, "prefill_tokens": 512, "adapter_memory_mb": 10.0}
    engine = EngineReplica(None, registry.path, limits, "float32", "cpu", 0.5, None)
    chooser = RouterReplica(str(folder / "router"), None, None, registry.path, 0.5, None)
    yield Backends(engine.experts, engine.answer, engine.stream, chooser.route, chooser.read)
    engine.close()
    chooser.close()


@contextmanager
def serving(backends: Backends, keys: Keys) -> Iterator[str]:
    """Serve over HTTP in a thread, and give the URL."""
    gateway = Gateway(backends, Meters(), timeout_s=120)
    app = create_app(Ingress(gateway, keys, HttpLimits(), Meters()))
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def url(backends: Backends) -> Iterator[str]:
    with serving(backends, Keys()) as url:
        yield url


@pytest.fixture(scope="module")
def browser(url: str) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        # Inside a container there is rarely a sandbox to be had, and little shared memory.
        options = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, url: str) -> Iterator[Page]:
    """The page, just opened; at the end nothing may have gone wrong unseen."""
    with opened(browser, url) as page:
        yield page


@contextmanager
def opened(browser: Browser, url: str, *, num_models: int = 4) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 1100, "height": 900})
    page = context.new_page()
    page.set_default_timeout(60_000)
    expect.set_options(timeout=60_000)
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
    page.add_init_script(WATCH)
    page.goto(url)
    expect(page.locator("#left option")).to_have_count(num_models)
    yield page
    assert page.evaluate("violations") == []
    # Chromium itself writes down every answer that is no success.
    assert [one for one in wrong if "Failed to load resource" not in one] == []
    context.close()


def ask(page: Page, question: str, *, tokens: int = 12) -> Locator:
    """Ask by the keyboard, and return the cards of the answers when all is there."""
    if page.locator("#tokens").input_value() != str(tokens):
        page.evaluate("tokens => { document.getElementById('tokens').value = tokens }", tokens)
    page.locator("#question").fill(question)
    page.keyboard.press("Enter")
    cards = page.locator(".pair").last.locator(".answer")
    expect(page.locator("#send")).to_be_enabled()
    return cards


def chat(url: str, model: str, question: str, *, tokens: int = 12) -> dict[str, Any]:
    body = {"model": model, "messages": [{"role": "user", "content": question}]}
    body |= {"temperature": 0, "max_tokens": tokens}
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()


def said_by(url: str, model: str, question: str) -> str:
    return chat(url, model, question)["choices"][0]["message"]["content"]


def test_the_mixture_and_the_base_answer_side_by_side_as_they_do_elsewhere(
    page: Page, url: str, prompts: Prompts
) -> None:
    question = prompts["velan"][50]
    cards = ask(page, question)
    expect(cards).to_have_count(2)
    assert cards.locator(".name").all_inner_texts() == ["Mixture (moie)", "Base"]
    assert cards.locator(".route").all_inner_texts() == ["sent to velan", "without any expert"]
    texts = [said_by(url, model, question) for model in ("velan", "base")]
    assert texts[0] != texts[1]
    assert cards.locator(".text").all_text_contents() == texts
    expect(cards.nth(1).locator(".why")).to_be_hidden()

    def places(axis: str) -> set[float]:
        return {
            card.evaluate(f"card => card.getBoundingClientRect().{axis}") for card in cards.all()
        }

    assert len(places("y")) == 1
    page.set_viewport_size({"width": 400, "height": 800})
    assert len(places("x")) == 1
    assert page.evaluate("document.documentElement.scrollWidth") <= 400


def test_reasons_and_shades_are_those_that_the_router_tells(
    page: Page, url: str, prompts: Prompts
) -> None:
    question = prompts["velan"][51]
    card = ask(page, question).first
    request = card.locator(".request")
    expect(request).to_have_text(question)
    body = {"messages": [{"role": "user", "content": question}], "tokens": True}
    route = httpx.post(f"{url}/v1/route", json=body, timeout=60).json()
    rows = card.locator(".reasons tbody tr")
    assert rows.count() == 1 + len(route["reasons"])
    assert "velan" in card.locator(".case").inner_text()
    for reason, row in zip(route["reasons"], rows.all()[1:], strict=True):
        latent = str(reason["latent"])
        if reason["label"] != "unlabelled":
            assert reason["label"] in row.inner_text()
        assert f"latent {latent}" in row.inner_text()
        assert f"+{reason['contribution']:.3f}" in row.inner_text()
        on = {t["text"]: t["activations"].get(latent, 0) for t in route["tokens"]}
        peak = max(on.values())
        assert f"{peak:.2f}" in row.locator("td").nth(1).inner_text()
        row.get_by_role("radio").check()
        marks = request.locator("mark")
        shown = [(one.text_content(), one.get_attribute("title")) for one in marks.all()]
        assert len(shown) == sum(
            t["activations"].get(latent, 0) >= 0.1 * peak for t in route["tokens"] if t["text"]
        )
        for text, title in shown:
            assert title is not None
            assert float(title.rpartition(" · ")[2]) > 0
            assert text in on
    rows.first.get_by_role("radio").check()
    assert request.locator("mark").count() > 0
    expect(request).to_have_text(question)
    shares = card.locator(".scores tbody tr").all_inner_texts()
    best = max(route["scores"], key=lambda name: route["scores"][name])
    assert shares[0].split() == [best, f"{100 * route['scores'][best]:.1f}", "%"]


def test_where_no_expert_is_sure_the_page_says_what_spoke_against_the_nearest(
    page: Page, prompts: Prompts
) -> None:
    card = ask(page, prompts["small_talk"][50]).first
    assert card.locator(".route").inner_text() == "no expert is sure: the base answers"
    assert "against" in card.locator(".case").inner_text()
    expect(card.locator("mark").first).to_be_visible()
    assert all("−" in row for row in card.locator(".reasons tbody tr").all_inner_texts()[1:])


def test_an_answer_streams_in_and_the_next_request_builds_on_it(
    page: Page, url: str, prompts: Prompts
) -> None:
    page.locator("#right").select_option("")
    page.evaluate("""() => {
        window.seen = [];
        new MutationObserver(() => {
            const text = document.querySelector(".text")?.textContent;
            if (text && text !== seen.at(-1)) seen.push(text);
        }).observe(document.getElementById("turns"), { subtree: true, childList: true });
    }""")
    first = prompts["order"][50]
    answer = ask(page, first, tokens=24).first.locator(".text").text_content()
    seen = page.evaluate("seen")
    assert len(seen) > 1, "it came all at once"
    assert all(later.startswith(earlier) for earlier, later in zip(seen, seen[1:], strict=False))
    assert seen[-1] == answer
    with page.expect_request("**/v1/chat/completions") as sent:
        ask(page, "And 9, 7, 8")
    told: Any = sent.value.post_data_json
    assert [one["content"] for one in told["messages"]] == [first, answer, "And 9, 7, 8"]
    order = chat(url, "order", first)["route"]["experts"][0]["id"]
    assert told["moie"] == {"previous": order}
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator(".question")).to_have_count(0)
    with page.expect_request("**/v1/chat/completions") as sent:
        ask(page, "Hello")
    asked: Any = sent.value.post_data_json
    assert len(asked["messages"]) == 1


def test_base_and_experts_can_be_asked_by_name(page: Page, url: str, prompts: Prompts) -> None:
    page.locator("#right").select_option("")
    for model, told in (("order", "asked by name"), ("base", "without any expert")):
        page.get_by_role("button", name="New conversation").click()
        page.locator("#left").select_option(model)
        cards = ask(page, prompts["velan"][52])
        expect(cards).to_have_count(1)
        assert cards.locator(".route").inner_text() == told
        assert cards.locator(".text").text_content() == said_by(url, model, prompts["velan"][52])
        expect(cards.locator(".why")).to_be_hidden()


def test_an_error_is_shown_as_one_and_leaves_nothing_behind(page: Page) -> None:
    card = ask(page, "Too much", tokens=100_000).first
    assert "Error: " in card.inner_text()
    assert "context is" in card.locator(".wrong").inner_text()
    assert page.locator("#question").input_value() == "Too much"
    page.route("**/v1/chat/completions", lambda route: route.abort())
    assert "cannot be reached" in ask(page, "Nobody there").first.inner_text()
    page.unroute("**/v1/chat/completions")
    page.route("**/v1/route", lambda route: route.fulfill(status=429, json={
        "error": {"message": "too many requests are waiting: ask again in a moment"}
    }))  # fmt: skip
    with page.expect_request("**/v1/chat/completions") as sent:
        card = ask(page, "Put these in order: 3, 1, 2").first
    asked: Any = sent.value.post_data_json
    assert len(asked["messages"]) == 1
    expect(card.locator(".why .wrong")).to_contain_text("ask again in a moment")
    expect(card.locator(".reasons tbody tr").nth(1)).to_be_visible()


def test_a_stream_that_breaks_keeps_what_was_said_and_says_so(page: Page) -> None:
    page.locator("#right").select_option("")
    head = 'data: {"choices": [{"delta": {"content": "half an"}}], "route": %s}\n\n'
    head %= '{"experts": [], "chosen_by": "client"}'
    told = 'data: {"error": {"message": "the replica that answered is gone: ask again"}}\n\n'
    for rest, error in ((told, "is gone: ask again"), ("", "the stream broke off")):
        interrupted = functools.partial(
            Route.fulfill, content_type="text/event-stream", body=head + rest
        )
        page.route("**/v1/chat/completions", lambda route, _, to=interrupted: to(route))
        card = ask(page, "Hello").first
        assert card.locator(".text").text_content() == "half an"
        assert error in card.locator(".wrong").inner_text()
        page.unroute("**/v1/chat/completions")


def test_no_text_is_ever_taken_for_html(page: Page, url: str) -> None:
    evil = (
        '<img src="x" onerror="window.hit=1"><script>window.hit=1</script>'
        '<iframe srcdoc="<script>parent.hit=1</script>"></iframe>'
    )
    page.locator("#right").select_option("")
    card = ask(page, evil).first
    expect(card.locator(".request")).to_have_text(evil)
    assert page.locator(".question").inner_text() == evil
    route = {
        "experts": [{"id": "0", "name": evil, "weight": 1}],
        "chosen_by": "router",
        "abstained": False,
        "reasons": [{"latent": 7, "label": evil, "contribution": 0.5}],
        "scores": {evil: 0.9, "base": 0.1},
    }
    chunk = {"route": route, "choices": [{"delta": {"content": evil}, "finish_reason": "stop"}]}
    page.route("**/v1/chat/completions", lambda to: to.fulfill(
        content_type="text/event-stream", body=f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n"
    ))  # fmt: skip
    tokens = [{"text": evil, "activations": {"7": 2}}]
    page.route("**/v1/route", lambda to: to.fulfill(json={**route, "tokens": tokens}))
    card = ask(page, "Hello").first
    expect(card.locator("mark")).to_have_text(evil)
    for place in (".route", ".text", ".case", ".reasons", ".scores"):
        assert evil in (card.locator(place).text_content() or "")
    assert page.locator("#turns :is(img, script, iframe)").count() == 0
    page.route("**/v1/models", lambda to: to.fulfill(json={"data": [{"id": evil}]}))
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator("#left option")).to_have_text([evil])
    assert page.evaluate("window.hit") is None


def test_all_of_it_works_by_the_keyboard_alone(page: Page) -> None:
    def focused() -> str:
        return page.evaluate("document.activeElement.id || document.activeElement.tagName")

    order = []
    while (at := focused()) not in order:
        order.append(at)
        page.keyboard.press("Tab")
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none" or focused() == "BODY", focused()
    assert order == ["BODY", "left", "right", "SUMMARY", "question", "send", "anew"]
    page.locator("#left").focus()
    page.keyboard.press("ArrowDown")
    assert page.locator("#left").input_value() == "base"
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Tab")
    page.keyboard.press("Home")
    assert page.locator("#right").input_value() == ""
    page.locator("#question").focus()
    page.keyboard.type("Put these in order:")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("3, 1, 2")
    page.keyboard.press("Enter")
    expect(page.locator("mark").first).to_be_visible()
    assert page.locator(".question").inner_text() == "Put these in order:\n3, 1, 2"
    assert focused() == "question"
    page.locator(".why summary").focus()
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowDown")
    chosen = page.locator(".reasons input:checked")
    assert chosen.get_attribute("value") != ""
    hues = {one.get_attribute("class") for one in page.locator("mark").all()}
    assert len(hues) == 1


def test_an_answer_is_stopped(page: Page) -> None:
    page.locator("#right").select_option("")
    page.evaluate("document.getElementById('tokens').value = 450")
    page.evaluate("document.getElementById('temperature').value = 2")  # it hardly ever ends itself
    page.locator("#question").fill("Hello")
    page.keyboard.press("Enter")
    expect(page.locator(".text")).not_to_be_empty()
    page.keyboard.press("Escape")
    expect(page.locator(".note")).to_have_text("stopped")
    expect(page.locator("#send")).to_be_enabled()
    page.get_by_role("button", name="New conversation").click()
    assert ask(page, "Hello", tokens=2).locator(".wrong").count() == 0


def test_a_key_is_asked_for_and_taken(browser: Browser, backends: Backends, tmp_path: Path) -> None:
    key = add_key(str(tmp_path / "keys"), "test")
    keys = Keys(str(tmp_path / "keys"))
    with serving(backends, keys) as url, opened(browser, url, num_models=0) as page:
        expect(page.locator("#status")).to_contain_text("Error: no key that is known here")
        page.get_by_label("API key").fill(key)
        page.keyboard.press("Enter")
        expect(page.locator("#left option")).to_have_count(4)
        assert page.locator("#status").inner_text() == ""
        assert ask(page, "Hello").locator(".wrong").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1100, 400])
def test_nothing_is_hard_to_reach_or_to_read(
    page: Page, prompts: Prompts, scheme: Any, width: int
) -> None:
    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    page.set_viewport_size({"width": width, "height": 900})
    page.locator("#settings summary").click()
    card = ask(page, prompts["velan"][53]).first
    expect(card.locator("mark").first).to_be_visible()
    ask(page, "Too much", tokens=100_000)
    found = Axe().run(page).response["violations"]
    assert [(one["id"], [node["html"] for node in one["nodes"]]) for one in found] == []
    moving = """[...document.querySelectorAll("*")].filter((one) => {
        const style = getComputedStyle(one);
        return style.animationName !== "none" || style.transitionDuration !== "0s"
            || style.scrollBehavior !== "auto";
    }).length"""
    assert page.evaluate(moving) == 0
