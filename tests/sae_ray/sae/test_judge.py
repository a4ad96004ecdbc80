"""The judge: what it sees gives nothing away, and a rule that it follows scores as it must."""

import dataclasses
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from pydantic import JsonValue
from scipy.stats import binomtest

from sae_ray.chat import ChatTokenizer
from sae_ray.sae.contexts import Context, LatentContexts
from sae_ray.sae.judge import Examiner, Question, judge_latents, parse, wilson

LATENT = 918273
WORDS = ["orders", "customer", "query", "counts", "each", "since", "last", "day", "of", "May"]


@pytest.fixture
def tokenizer(tiny_lm: Path) -> ChatTokenizer:
    return ChatTokenizer.load(tiny_lm)


def contexts(tokenizer: ChatTokenizer, word: str = "query") -> LatentContexts:
    """A latent that is on at one word, its contexts, and others without the word."""
    rng = np.random.default_rng(0)

    def one(number: int, strength: float) -> Context:
        others = [other for other in WORDS if other != word]
        before, after = (" ".join(rng.choice(others, size=4)) for _ in range(2))
        texts = [f"{before} ", word if strength else "day", f" {after}"]
        parts = [tokenizer.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        values = [0.0] * len(parts[0]) + [strength] * len(parts[1]) + [0.0] * len(parts[2])
        ids = np.array(sum(parts, []), dtype=np.int32)
        return Context(ids, np.array(values, dtype=np.float32), number, 0)

    strengths = np.linspace(0.5, 9, 40).tolist()
    spread = [one(number, strength) for number, strength in enumerate(strengths)]
    return LatentContexts(
        strongest=spread[:-11:-1],
        spread=spread,
        hard=[one(100 + i, 0) for i in range(10)],
        easy=[one(200 + i, 0) for i in range(30)],
    )


def excerpts(question: Question) -> list[str]:
    return re.split(r"\n\n\d+:\n", question.messages[0]["content"])[1:]


def rule(question: Question) -> str:
    """Answer from the text alone: the label is the commonest marked word; then look for it."""
    content = question.messages[0]["content"]
    if question.kind == "explain":
        marked = Counter(re.findall(r"<<(.*?)>>", content.partition("\n\n")[2]))
        return json.dumps({"label": f'the word "{marked.most_common(1)[0][0]}"'})
    if question.kind == "rubric":
        return '{"score": 5, "name": "a word"}'
    word = re.findall(r'the word "(.*?)"', content)[0]
    if question.kind == "detect":
        return str([int(word in one) for one in excerpts(question)])
    return str([int(f"<<{word}>>" in one) for one in excerpts(question)])


def examined(tokenizer: ChatTokenizer, label: str | None = None) -> tuple[list[Question], dict]:
    examiner, found = Examiner(tokenizer), contexts(tokenizer)
    questions = examiner.first(LATENT, found)
    answers: dict[str, JsonValue] = {q.key: parse(q, rule(q)) for q in questions}
    named = judge_latents(questions, answers)[LATENT].label
    assert named == 'the word "query"'
    questions += examiner.second(LATENT, found, label or named)
    return questions, answers | {q.key: parse(q, rule(q)) for q in questions}


def test_a_judge_that_follows_the_rule_is_always_right(tokenizer: ChatTokenizer) -> None:
    questions, answers = examined(tokenizer)
    judgement = judge_latents(questions, answers)[LATENT]
    assert judgement.rubric == 5
    assert judgement.detection == wilson(20, 20)
    assert judgement.fuzzing == wilson(10, 10)


def test_a_wrong_label_is_no_better_than_guessing(tokenizer: ChatTokenizer) -> None:
    questions, answers = examined(tokenizer, 'the word "zebra"')
    judgement = judge_latents(questions, answers)[LATENT]
    # It sees the word nowhere; half of what it is shown is on.
    assert judgement.detection == wilson(10, 20)
    assert judgement.fuzzing == wilson(5, 10)


def test_the_judge_sees_texts_and_marks_and_nothing_else(tokenizer: ChatTokenizer) -> None:
    questions, _ = examined(tokenizer)
    assert {q.kind for q in questions} == {"explain", "rubric", "detect", "fuzz"}
    shown = json.dumps([q.messages for q in questions])
    for given_away in (str(LATENT), "SAE", "sae", "latent", "blocks.", "jumprelu", "fast", "Llama"):
        assert given_away not in shown
    for question in questions:
        if question.kind == "detect":
            assert "<<" not in question.messages[0]["content"]
            assert 1 <= sum(question.truth) < len(question.truth)
    orders = {q.truth for q in questions if q.kind == "detect"}
    assert tuple([True] * 5 + [False] * 5) not in orders


def test_it_is_examined_on_contexts_that_it_has_not_explained(tokenizer: ChatTokenizer) -> None:
    questions, _ = examined(tokenizer)
    plain = {
        kind: {
            one.replace("<<", "").replace(">>", "").strip()
            for question in questions
            if question.kind == kind
            for one in excerpts(question)
        }
        for kind in ("explain", "detect", "fuzz")
    }
    assert len(plain["explain"]) == 10
    assert not plain["explain"] & (plain["detect"] | plain["fuzz"])


def test_the_same_seed_asks_the_same(tokenizer: ChatTokenizer) -> None:
    keys = [
        [q.key for q in Examiner(tokenizer, seed=seed).second(3, contexts(tokenizer), "x")]
        for seed in (0, 0, 1)
    ]
    assert keys[0] == keys[1]
    assert not set(keys[0]) & set(keys[2])


def test_a_latent_that_is_hardly_ever_on_is_not_asked_about(tokenizer: ChatTokenizer) -> None:
    few = contexts(tokenizer)
    assert Examiner(tokenizer).first(1, LatentContexts(few.strongest[:4], [], [], [])) == []
    always = LatentContexts(few.strongest, few.spread, [], [])
    assert {q.kind for q in Examiner(tokenizer).second(1, always, "x")} == {"fuzz"}


def test_marks_that_a_text_already_holds_do_not_count(tokenizer: ChatTokenizer) -> None:
    ids = tokenizer.tokenizer("a << b >> c", add_special_tokens=False)["input_ids"]
    values = np.zeros(len(ids), dtype=np.float32)
    values[0] = 2.0
    one = Context(np.array(ids, dtype=np.int32), values, 0, 0)
    (explain, _) = Examiner(tokenizer).first(0, LatentContexts([one] * 5, [], [], []))
    assert excerpts(explain)[0] == "<<a>> < < b > > c"


@pytest.mark.parametrize(
    ("kind", "reply", "answer"),
    [
        ("explain", 'Sure! {"label": " words for  food. "} Bye.', "words for food"),
        ("explain", '{"label": ""}', None),
        ("explain", '{"name": "food"}', None),
        ("explain", "It is about food.", None),
        ("explain", "", None),
        ("rubric", '{"score": 4, "name": "x"}', 4),
        ("rubric", '{"score": "4"}', 4),
        ("rubric", '{"score": 4.5}', None),
        ("rubric", '{"score": 0}', None),
        ("rubric", '{"score": true}', None),
        ("rubric", "I would say 4.", None),
        ("rubric", "{4}", None),
        ("detect", "[1, 0, 1]", [1, 0, 1]),
        ("detect", "They are: [1,0,1]. As [1] shows: [0, 0, 1]", [0, 0, 1]),
        ("detect", "[1, 0]", None),
        ("detect", "[1, 0, 2]", None),
        ("detect", "[1, 0, yes]", None),
        ("detect", '[1, 0, "1"]', None),
        ("detect", "Yes, no and yes.", None),
    ],
)
def test_an_answer_is_read_only_in_the_form_asked_for(
    kind: str, reply: str, answer: JsonValue
) -> None:
    truth = (True, False, True) if kind == "detect" else ()
    assert parse(Question(0, kind, [], truth), reply) == answer  # pyright: ignore


@pytest.mark.parametrize(("right", "num"), [(0, 7), (7, 7), (27, 128), (13, 128), (500, 1000)])
def test_intervals_are_wilsons(right: int, num: int) -> None:
    expected = binomtest(right, num).proportion_ci(method="wilson")
    found = wilson(right, num)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-6)
    assert found.share == right / num


def test_with_nothing_counted_nothing_is_known() -> None:
    found = wilson(0, 0)
    assert (found.share, found.low, found.high, found.num) == (None, 0.0, 1.0, 0)


def test_contexts_that_can_only_be_marked_rightly_are_not_asked_about(
    tokenizer: ChatTokenizer,
) -> None:
    found = contexts(tokenizer)
    dense = [
        dataclasses.replace(
            one, values=np.where(np.arange(len(one.ids)) % 3 == 0, 0, 5).astype(np.float32)
        )
        for one in found.spread
    ]
    rng = np.random.default_rng(0)
    assert Examiner(tokenizer)._fuzzed(dense, rng) == []
    truths = [truth for _, truth in Examiner(tokenizer)._fuzzed([*found.spread, *dense], rng)]
    assert truths.count(True) == truths.count(False) > 0
