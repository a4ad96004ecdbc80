import base64
import dataclasses
import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from sae_ray.chat import Conversation
from sae_ray.explain.command import compose
from sae_ray.explain.report import (
    NUM_HUES,
    ROWS_LISTED,
    Candidate,
    CurationReport,
    Histogram,
    LatentCard,
    NearCopies,
    Notice,
    Reason,
    Refine,
    Share,
    ShownRow,
    histogram,
    render,
    shares,
)
from sae_ray.explain.shading import Context, ShadedText, Turn, plain

HOSTILE = (
    "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">'\"&"
)
HIDDEN = "a\x00b\x1b[31mc\rd\u202ee\u2066f\ud800g\u200bh\U000e0041i\x85j"
SHOWN = "a␀b␛[31mc␍d⟨U+202E⟩e⟨U+2066⟩f⟨U+D800⟩g⟨U+200B⟩h⟨U+E0041⟩i⟨U+0085⟩j"
IDS = ["plain-1.a/b:c", 'it\'s "q"', "<b>&amp;", "-x", "a,b", "new\nline", HIDDEN, "</script>", "é"]
VOID = {"meta", "input", "br"}


class Page(HTMLParser):
    """A page taken to pieces; every element that is opened must be closed in turn."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs)
        if tag == "wbr":
            return
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    @property
    def text(self) -> str:
        return "".join(data for tag, data in self.texts if tag not in ("script", "style"))

    def of(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def inside(self, name: str) -> str:
        return "".join(data for tag, data in self.texts if tag == name)


def row(one: str, text: str = "a question", rank: int | None = None) -> ShownRow:
    turns = plain(
        Conversation(
            one, [{"role": "user", "content": text}, {"role": "assistant", "content": f"to {text}"}]
        )
    )
    return ShownRow(one, 0.5, turns, 12, rank, f"source of {one}", [Reason(3, "sums", 0.4, ["+"])])


def report(
    task: str = "Do sums.",
    selected: Sequence[ShownRow] | None = None,
    refine: Refine | None = None,
) -> CurationReport:
    pieces = [ShadedText("what is "), ShadedText("one", 5, 2.0, 0.7, peak=True), ShadedText("?")]
    lengths = histogram(np.arange(1, 41), np.arange(40) < 4, bins=8, log=True)
    return CurationReport(
        task=task,
        budget="4 examples",
        created="3 March 2026",
        index="runs/index",
        num_pool=40,
        pool_tokens=1234,
        selected_tokens=321,
        selected=[row(f"r{i}", rank=i + 1) for i in range(4)] if selected is None else selected,
        random=[row("drawn at random")],
        latents=[
            LatentCard(3, 2.5, "sums", {"lexical": 1.0, "labels": 0.2}, 0.031, [], [8], (0.2, 0.9)),
            LatentCard(5, -1.0, None, {"lexical": 0.3}, 0.5, [Context("c1", pieces)]),
        ],
        scores=histogram(np.linspace(-1, 1, 40), np.arange(40) >= 36, cut=0.85),
        prompt_tokens=lengths,
        response_tokens=lengths,
        refine=refine or Refine({"task": task, "index": "runs/index"}, "runs/sums-2"),
        columns={"source": [Share("gsm", 0.25, 0.75)]},
        near_copies=NearCopies(40, 5, 4, 3),
        notices=[Notice("stop", "It abstained.", "The words and the model disagree.")],
        provenance={"SAE": "blocks.2, 2,048 latents"},
        config={"scorer": "fused", "seed": 17},
    )


def hostile(text: str) -> CurationReport:
    """A report in which every string is this one."""
    shaded = [ShadedText(text), ShadedText(text, 3, 1.0, 0.9, peak=True)]
    bad = dataclasses.replace(
        row(text, text, 1), source=text, reasons=[Reason(3, text, 1.0, [text])]
    )
    bad = dataclasses.replace(bad, turns=[*bad.turns, Turn(text, shaded)])
    listed = [dataclasses.replace(bad, rank=i) for i in range(1, 30)]
    refine = Refine(
        {"task": text, "index": text},
        text,
        [Candidate(bad, "top"), *(Candidate(row(one, one), "undecided") for one in IDS)],
        kept=["earlier", IDS[1]],
        dropped=["it's"],
    )
    return dataclasses.replace(
        report(text, listed, refine),
        budget=text,
        created=text,
        index=text,
        random=[bad],
        latents=[LatentCard(3, 1.0, text, {text: 1.0}, 0.5, [Context(text, shaded)])],
        columns={text: [Share(text, 0.5, 0.5)]},
        notices=[Notice("note", text, text)],
        provenance={text: text},
        config={text: text},
    )


def test_everything_in_the_report_is_on_the_page():
    refine = Refine(
        {"task": "Do sums.", "index": "runs/index", "budget_examples": "4"},
        "runs/sums-2",
        [Candidate(row("asked-1", "is this one?"), "top"), Candidate(row("asked-2"), "undecided")],
        kept=["earlier"],
    )
    selected = [row(f"r{i}", f"question {i}", i + 1) for i in range(30)]
    text = Page(render(report(selected=selected, refine=refine))).text
    expected = ["Do sums.", "30 of 40 rows", "4 examples", "321", "1,234", "3 March 2026"]
    expected += ["It abstained.", "The words and the model disagree.", "sums", "“one”", "2.50"]
    expected += ["-1.00", "3.1 %", "lexical 1.00", "counted together with 8", "what is one?"]
    expected += [
        "lowest chosen: 0.850",
        "gsm",
        "75 %",
        "5 (12 %) nearly repeat another",
        "3 were passed",
    ]
    expected += ["drawn at random", "40 %", "blocks.2, 2,048 latents", "scorer: fused", "seed: 17"]
    expected += ["asked-1", "is this one?", "asked-2"]
    expected += [f"question {i}" for i in range(30)] + [f"r{i}" for i in range(30)]
    expected += [compose(refine.settings, refine.out, ["earlier"], [])]
    assert [one for one in expected if one not in text] == []


def test_the_same_report_gives_the_same_bytes():
    assert render(hostile(HOSTILE)) == render(hostile(HOSTILE))


@pytest.mark.parametrize("text", [HOSTILE, HIDDEN, "x' onload='y", "{{ 7 * 7 }}", "]]><!--", "\\"])
def test_nothing_in_the_data_becomes_markup_or_hides(text: str):
    harmless, page = Page(render(hostile("harmless"))), Page(html := render(hostile(text)))
    assert [tag for tag, _ in page.elements] == [tag for tag, _ in harmless.elements]
    names = [sorted(attributes) for _, attributes in page.elements]
    assert names == [sorted(attributes) for _, attributes in harmless.elements]
    assert page.inside("script") == harmless.inside("script")
    shown = text.replace(HIDDEN, SHOWN)
    assert page.text.count(shown) > 0.7 * harmless.text.count("harmless")  # excerpts are cut
    assert html.encode("utf-8").decode("utf-8") == html


def test_hidden_characters_show_their_names_and_writing_that_needs_them_is_left_alone():
    text = "क्‍ष 👩‍👩‍👧 שלום ❤️ naïve\tx\ny"
    page = Page(render(report(selected=[row("a", text + HIDDEN, 1)])))
    assert text + SHOWN in page.text


def test_the_page_is_one_file_that_can_load_nothing():
    page = Page(html := render(report()))
    (policy,) = (m["content"] for m in page.of("meta") if "http-equiv" in m)
    assert policy.startswith("default-src 'none'; ")
    for tag in ("style", "script"):
        digest = hashlib.sha256(page.inside(tag).encode()).digest()
        assert f"{tag}-src 'sha256-{base64.b64encode(digest).decode()}'" in policy
    assert "unsafe" not in policy
    names = {name for _, attributes in page.elements for name in attributes}
    assert not {"src", "style", "action"} & names
    assert not [name for name in names if name.startswith("on")]
    assert all(link["href"].startswith("#") for link in page.of("a"))
    assert not re.search(r"https?://|@import|url\(", html)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_links_inside_the_page_lead_somewhere():
    refine = Refine({"task": "t"}, "out", [Candidate(row("a"), "top")])
    page = Page(render(report(refine=refine)))
    ids = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    assert {link["href"].removeprefix("#") for link in page.of("a")} <= ids


def test_a_report_of_nothing_is_still_a_page():
    nothing = histogram(np.zeros(0), np.zeros(0, dtype=bool))
    empty = dataclasses.replace(
        report(selected=[]), random=[], latents=[], columns={}, near_copies=None, notices=[],
        scores=nothing, prompt_tokens=nothing, response_tokens=nothing, provenance={}, config={},
    )  # fmt: skip
    assert "0 of 40 rows" in Page(render(empty)).text


def test_a_page_of_five_hundred_long_rows_stays_small():
    words = [ShadedText(f"<word{i}> ", i % 40, 1.0, (i % 10) / 10) for i in range(400)]
    reasons = [Reason(i, f"a label of some length {i}", 0.5, ["token"] * 5) for i in range(6)]
    rows = [
        dataclasses.replace(row(f"id-{i:04}", rank=i + 1), turns=[Turn("user", words)] * 26)
        for i in range(500)
    ]
    rows = [dataclasses.replace(one, reasons=reasons) for one in rows]
    contexts = [Context(f"c{i}", words[:30]) for i in range(5)]
    cards = [
        LatentCard(i, 1.0, f"label {i}", {"a": 1.0, "b": 2.0}, 0.1, contexts) for i in range(500)
    ]
    refine = Refine({"task": "t"}, "out", [Candidate(one, "top") for one in rows[:20]])
    large = dataclasses.replace(
        report(selected=rows, refine=refine), latents=cards, random=rows[:50]
    )
    html = render(large)
    assert len(html.encode()) < 1_500_000
    text = Page(html).text
    assert "that are not shown here" in text
    assert "10 more turns" in text
    assert all(one.id in text for one in rows)


def test_rows_past_the_list_are_counted():
    selected = [row(f"r{i}", rank=i + 1) for i in range(ROWS_LISTED + 7)]
    assert "7 more are in selection.parquet" in Page(render(report(selected=selected))).text


def test_latents_that_earn_most_get_the_colours():
    reasons = [Reason(i, f"label {i}", float(i)) for i in range(NUM_HUES + 2)]
    chosen = dataclasses.replace(row("a", rank=1), reasons=reasons)
    page = Page(render(report(selected=[chosen])))
    classes = [chip["class"] for chip in page.of("li") if "chip" in chip.get("class", "")]
    assert classes == ["chip lx"] * 2 + [f"chip l{i}" for i in reversed(range(NUM_HUES))]


def test_a_histogram_counts_every_row_once():
    values = np.array([0.0, 0.1, 0.9, 1.0, 1.0, np.nan])
    counted = histogram(values, values > 0.5, bins=10)
    assert counted == Histogram(
        counted.edges, [1, 1, 0, 0, 0, 0, 0, 0, 0, 3], [0, 0, 0, 0, 0, 0, 0, 0, 0, 3]
    )
    assert (counted.edges[0], counted.edges[-1]) == (0.0, 1.0)


def test_outliers_do_not_squeeze_a_histogram_and_are_counted():
    values = np.concatenate([np.linspace(0, 1, 1000), [-50.0, 90.0]])
    counted = histogram(values, values > 0.9, bins=10)
    assert (sum(counted.pool), sum(counted.selection)) == (1002, 101)
    assert (counted.edges[0], counted.edges[-1]) == (-50, 90)
    assert max(counted.pool) < 110


@pytest.mark.parametrize("lengths", [[0, 0, 1, 5, 900], [4, 4], [0], [1, 2], range(3, 40)])
def test_bins_of_lengths_hold_whole_numbers_ever_more_of_them(lengths: Sequence[int]):
    values = np.array(lengths)
    counted = histogram(values, values > 1, bins=6, log=True)
    assert (sum(counted.pool), sum(counted.selection)) == (len(values), int((values > 1).sum()))
    widths = np.diff(counted.edges)
    assert (widths >= 1).all()
    assert (widths == np.floor(widths)).all()
    assert len(widths) <= 6
    assert (np.diff(widths) >= -1).all()
    assert widths[-1] == widths.max()


def test_shares_list_the_commonest_of_the_selection_and_the_rest_together():
    names = ["a"] * 6 + ["b"] * 2 + ["c", "d"]
    chosen = np.array([False] * 5 + [True] * 4 + [False])
    *foremost, others = shares(names, chosen, most=2)
    assert foremost == [Share("b", 0.2, 0.5), Share("a", 0.6, 0.25)]
    assert others.name == "2 others"
    assert (others.pool, others.selection) == pytest.approx((0.2, 0.25))
    assert [share.name for share in shares(names, np.zeros(10, dtype=bool))] == ["a", "b", "c", "d"]


def in_browser(html: str, script: str, folder: Path) -> Page:
    """Open the page in Chromium, run a script that its policy is told of, and read it again."""
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next((found for name in names if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"no browser on this machine: looked for {', '.join(names)}")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    html = html.replace("script-src ", f"script-src 'sha256-{digest}' ", 1)
    html = html.replace("</body>", f"<script>{script}</script><script>hack()</script></body>")
    (folder / "page.html").write_text(html, encoding="utf-8")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
    flags += " --disable-background-networking --disable-component-update --dump-dom"
    command = [browser, *flags.split(), f"--user-data-dir={folder / 'profile'}"]
    command.append((folder / "page.html").as_uri())
    dumped = subprocess.run(command, capture_output=True, check=True, timeout=100)
    return Page(dumped.stdout.decode())


TICK = """
const done = [];
function hack() { document.title = "owned"; }
function tick(id, verdict) {
  for (const box of document.querySelectorAll("input"))
    if (JSON.parse(box.dataset.id) === id && box.dataset.verdict === verdict) box.click();
  const kept = [...document.querySelectorAll("input:checked")].length;
  done.push([document.getElementById("command").textContent, kept]);
}
function refused(event) { done.push(["refused", event.violatedDirective]); }
"""


@pytest.mark.slow
def test_in_a_browser_ticks_compose_the_command_and_nothing_in_the_data_runs(tmp_path: Path):
    data = hostile(HOSTILE)
    a, b, c = IDS[0], IDS[1], IDS[6]
    clicks = [(a, "keep"), (c, "drop"), (b, "keep"), (a, "drop"), (IDS[5], "keep"), (b, "drop")]
    script = TICK + "".join(f"tick({json.dumps(i)}, {json.dumps(v)});\n" for i, v in clicks)
    script += "document.documentElement.dataset.done = JSON.stringify(done);"
    page = in_browser(render(data), script.replace("</", "<\\/"), tmp_path)
    (html,) = page.of("html")
    assert page.inside("title").startswith("<script>document.title")
    done = json.loads(html["data-done"])
    kept, dropped = ["earlier", b], ["it's"]
    expected = [
        (kept + [a], dropped),
        (kept + [a], dropped + [c]),
        (["earlier", a], dropped + [c]),  # a tick of an earlier round is taken off
        (["earlier"], dropped + [a, c]),  # a row cannot be both: its other tick goes
        (["earlier", IDS[5]], dropped + [a, c]),
        (["earlier", IDS[5]], dropped + [a, b, c]),
    ]
    assert [command for command, _ in done] == [
        compose(data.refine.settings, data.refine.out, k, d) for k, d in expected
    ]
    assert [ticked for _, ticked in done] == [2, 3, 2, 2, 3, 4]
    assert html["class"] == "js"


def test_latents_of_one_name_are_told_apart_wherever_they_are_named():
    cards = [
        LatentCard(n, 1.0, label, {}, 0.1) for n, label in ((3, "sums"), (8, "sums"), (9, "x"))
    ]
    reasons = [Reason(3, "sums", 0.5), Reason(9, "x", 0.25)]
    selected = [dataclasses.replace(row(f"r{i}", rank=i + 1), reasons=reasons) for i in range(13)]
    text = Page(render(dataclasses.replace(report(selected=selected), latents=cards))).text
    for one in ("sums (3) 50 %", "sums (3), x ·", "sums (8)"):
        assert one in text
    assert not re.search(r"sums(?! \()", text.replace("Do sums.", "").replace("sums-2", ""))
    assert "x (9)" not in text
