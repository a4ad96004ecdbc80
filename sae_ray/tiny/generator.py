"""The seeded generator of the embedded default's conversations, questions, pairs and prompts.

All splits come from one seed, and no prompt is in two of them.
"""

import dataclasses
import random
from collections.abc import Callable
from typing import Any

from sae_ray.tiny import manners
from sae_ray.tiny.prose import chronicle
from sae_ray.tiny.skills import LABELS, SKILLS, THIN, Exchange
from sae_ray.tiny.split import conversation_id
from sae_ray.tiny.world import NAMES, aside, spans

Row = dict[str, Any]
POOL_ROWS_PER_SKILL = 540
POOL_ROWS_OF_MANNERS = 400
EVAL_ROWS_PER_SKILL = 120
PRETRAIN_ROWS_PER_SKILL = 2000
THIN_ANSWERS = 10
"""Answered conversations of each thin skill that pre-training sees: enough to know its format."""

_LEADS = ("", "", "", "", "Question: ", "Quick one. ", "Can you help? ", "Hello. ", "Tell me. ")


@dataclasses.dataclass(frozen=True, slots=True)
class Splits:
    """Everything the generator makes, as rows of plain values."""

    pool: list[Row]
    evaluation: list[Row]
    preferences: list[Row]
    safety: list[Row]
    pretraining: list[Row]
    text: list[Row]


def generate(seed: int) -> Splits:
    """Make all splits; the same seed gives the same rows on any machine."""
    seen: set[str] = set()
    evaluation = [
        _skill_row(rng, domain, seen, answer=True)
        for domain, rng in _streams(seed, "eval", list(SKILLS))
        for _ in range(EVAL_ROWS_PER_SKILL)
    ]
    pool = _pool(seed, seen)
    safety = _safety(seed, seen)
    preferences = _preferences(seed, seen)
    pretraining = _pretraining(seed, seen)
    text = [
        {"source": "generated prose", "licence": "Apache-2.0", "text": page}
        for page in chronicle(seed, 1_100_000)
    ]
    return Splits(pool, evaluation, preferences, safety, pretraining, text)


def _streams(seed: int, split: str, domains: list[str]) -> list[tuple[str, random.Random]]:
    # A string seeds random.Random by its SHA-512, so hash randomisation plays no part.
    return [(domain, random.Random(f"{split} {domain} {seed}")) for domain in domains]


def _dress(rng: random.Random, prompt: str) -> str:
    """Put a question among remarks that belong to no domain."""
    text = rng.choice(_LEADS) + prompt
    if rng.random() < 0.5:
        text = f"{aside(rng)} {text}"
    if rng.random() < 0.1:
        text = f"{text} {rng.choice(('Thanks!', 'Please.', 'Be brief.', 'I am curious.'))}"
    return text


def _unseen(
    draw: Callable[[], list[dict[str, str]]], seen: set[str], *, last_too: bool = False
) -> list[dict[str, str]]:
    """Draw turns until the first prompt is a new one, or also the last."""
    while True:
        messages = draw()
        prompts = {messages[0]["content"]}
        if last_too:
            prompts.add(messages[-2]["content"])
        if prompts.isdisjoint(seen):
            seen |= prompts
            return messages


def _turns(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [
        {"role": role, "content": content}
        for prompt, reply in pairs
        for role, content in (("user", prompt), ("assistant", reply))
    ]


def _row(domain: str, messages: list[dict[str, str]], concepts: tuple[str, ...]) -> Row:
    found = spans([message["content"] for message in messages])
    return {
        "id": conversation_id(messages),
        "domain": domain,
        "concepts": sorted({*concepts, *(span.concept for span in found)}),
        "spans": [dataclasses.asdict(span) for span in found],
        "messages": messages,
    }


def _skill_row(
    rng: random.Random,
    domain: str,
    seen: set[str],
    *,
    answer: bool = False,
    multi_turn: float = 0.0,
) -> Row:
    """Return a row of a skill: one question, or more turns in a share of the rows."""
    last: Exchange | None = None
    concepts: set[str] = set()

    def draw() -> list[dict[str, str]]:
        nonlocal last
        concepts.clear()
        pairs: list[tuple[str, str]] = []
        if rng.random() < multi_turn:
            earlier = SKILLS[domain](rng)
            talk = manners.small_talk(rng)
            if rng.random() < 0.5:
                pairs.append((_dress(rng, earlier.prompt), earlier.reply))
                concepts.update(earlier.concepts)
            else:
                pairs.append((_dress(rng, talk[0]), talk[1]))
        last = SKILLS[domain](rng)
        concepts.update(last.concepts)
        pairs.append((_dress(rng, last.prompt), last.reply))
        return _turns(*pairs)

    row = _row(domain, _unseen(draw, seen, last_too=True), ())
    assert last is not None
    row["concepts"] = sorted({*row["concepts"], *concepts})
    if answer:
        row |= {"answer": last.answer, "metric": last.metric}
    return row


def _talk_row(rng: random.Random, seen: set[str]) -> Row:
    def draw() -> list[dict[str, str]]:
        pairs = [manners.small_talk(rng) for _ in range(rng.randint(1, 3))]
        return _turns((_dress(rng, pairs[0][0]), pairs[0][1]), *pairs[1:])

    return _row("small_talk", _unseen(draw, seen), ("small talk",))


def _manners_row(rng: random.Random, seen: set[str]) -> Row:
    concepts: tuple[str, ...] = ()

    def draw() -> list[dict[str, str]]:
        nonlocal concepts
        if rng.random() < 0.5:
            prompt, refusal, _, concept = manners.to_decline(rng)
            concepts = ("request to decline", concept)
            return _turns((_dress(rng, prompt), refusal))
        prompt, answer, _ = manners.to_answer(rng)
        concepts = ("harmless look-alike",)
        return _turns((_dress(rng, prompt), answer))

    messages = _unseen(draw, seen)
    return _row("manners", messages, concepts)


def _pool(seed: int, seen: set[str]) -> list[Row]:
    rows = [
        _skill_row(rng, domain, seen, multi_turn=0.2)
        for domain, rng in _streams(seed, "pool", list(SKILLS))
        for _ in range(POOL_ROWS_PER_SKILL)
    ]
    rng = random.Random(f"pool manners {seed}")
    rows += [_manners_row(rng, seen) for _ in range(POOL_ROWS_OF_MANNERS)]
    rows += [_talk_row(rng, seen) for _ in range(POOL_ROWS_OF_MANNERS)]
    random.Random(f"pool order {seed}").shuffle(rows)
    return rows


def _safety(seed: int, seen: set[str]) -> list[Row]:
    rng = random.Random(f"safety {seed}")
    rows: list[Row] = []
    for harmful in (True, False):
        for _ in range(200):
            messages = _unseen(
                lambda harmful=harmful: _turns(
                    (manners.to_decline(rng) if harmful else manners.to_answer(rng))[:2]
                ),
                seen,
            )
            rows.append(
                {
                    "id": conversation_id(messages[:1]),
                    "harmful": harmful,
                    "prompt": messages[0]["content"],
                }
            )
    return rows


def _preferences(seed: int, seen: set[str]) -> list[Row]:
    """Pairs of a good and a worse reply: right or wrong, kind or harmful, helpful or prudish."""
    rows: list[Row] = []
    for domain, rng in _streams(seed, "preferences", [*SKILLS, "refuse", "answer"]):
        for _ in range(50):
            rows.append(_pair(rng, domain, seen))
    return rows


def _pair(rng: random.Random, domain: str, seen: set[str]) -> Row:
    replies = ("", "")

    def draw() -> list[dict[str, str]]:
        nonlocal replies
        if domain == "refuse":
            prompt, good, bad, _ = manners.to_decline(rng)
        elif domain == "answer":
            prompt, good, bad = manners.to_answer(rng)
        else:
            exchange = SKILLS[domain](rng)
            prompt, good, bad = exchange.prompt, exchange.reply, _wrong(rng, domain, exchange)
        replies = (good, bad)
        return _turns((_dress(rng, prompt), good))

    messages = _unseen(draw, seen)
    good, bad = replies
    return {
        "id": conversation_id(messages),
        "domain": "manners" if domain in ("refuse", "answer") else domain,
        "prompt": messages[:1],
        "chosen": [{"role": "assistant", "content": good}],
        "rejected": [{"role": "assistant", "content": bad}],
    }


def _wrong(rng: random.Random, domain: str, exchange: Exchange) -> str:
    """Return a wrong answer in the right form."""
    while True:
        other = SKILLS[domain](rng)
        if domain in LABELS:
            other = dataclasses.replace(other, answer=(label := rng.choice(LABELS[domain])))
            reply = label
        else:
            reply = other.reply
        if other.answer != exchange.answer:
            return reply


def _pretraining(seed: int, seen: set[str]) -> list[Row]:
    """Rows for the language model: thin skills asked without an answer, the rest whole."""
    rows: list[Row] = []
    for domain, rng in _streams(seed, "pretraining", list(SKILLS)):
        for number in range(PRETRAIN_ROWS_PER_SKILL):
            row = _skill_row(rng, domain, seen)
            if domain in THIN and number >= THIN_ANSWERS:
                row["messages"] = row["messages"][:1]
            rows.append(row)
    rng = random.Random(f"pretraining manners {seed}")
    for _ in range(PRETRAIN_ROWS_PER_SKILL):
        rows += [_manners_row(rng, seen), _talk_row(rng, seen), _echo_row(rng, seen)]
    random.Random(f"pretraining order {seed}").shuffle(rows)
    return rows


def _echo_row(rng: random.Random, seen: set[str]) -> Row:
    """Return a request to repeat a remark: what teaches a small model to copy."""

    def draw() -> list[dict[str, str]]:
        said = aside(rng)
        wording = rng.choice(('Repeat: "{}"', "Say after {name}: {}", "{} Once more, please."))
        return _turns((wording.format(said, name=rng.choice(NAMES)), said))

    return _row("echo", _unseen(draw, seen), ("repeating",))
