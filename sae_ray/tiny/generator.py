"""The seeded generator of the embedded default's conversations, questions, pairs and prompts.

All splits come from one seed, and no prompt is in two of them.
"""

import dataclasses
import random
from typing import Any

from sae_ray.tiny import manners
from sae_ray.tiny.prose import chronicle
from sae_ray.tiny.skills import LABELS, SKILLS, THIN, Exchange
from sae_ray.tiny.split import conversation_id
from sae_ray.tiny.world import NAMES, aside, spans

Message = dict[str, str]
Row = dict[str, Any]
POOL_ROWS_PER_SKILL = 540
POOL_ROWS_OF_MANNERS = 400
EVAL_ROWS_PER_SKILL = 120
PREFERENCES_PER_SKILL = 50
SAFETY_ROWS = 200
"""Prompts to decline, and as many look-alikes."""
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


def generate(seed: int, *, pretraining_rows: int = PRETRAIN_ROWS_PER_SKILL) -> Splits:
    """Make all splits; the same seed gives the same rows on any machine."""
    seen: set[str] = set()
    evaluation = [
        _skill_row(rng, domain, seen, answer=True)
        for domain, rng in _streams(seed, "eval", list(SKILLS))
        for _ in range(EVAL_ROWS_PER_SKILL)
    ]
    return Splits(
        evaluation=evaluation,
        pool=_pool(seed, seen),
        safety=_safety(seed, seen),
        preferences=_preferences(seed, seen),
        pretraining=_pretraining(seed, seen, pretraining_rows),
        text=[
            {"source": "generated prose", "licence": "MIT", "text": page}
            for page in chronicle(seed, 1_100_000)
        ],
    )


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


def _claim(prompts: set[str], seen: set[str]) -> bool:
    """Say whether prompts are new ones, and note them if so."""
    if not prompts.isdisjoint(seen):
        return False
    seen |= prompts
    return True


def _turns(*pairs: tuple[str, str]) -> list[Message]:
    return [
        {"role": role, "content": content}
        for prompt, reply in pairs
        for role, content in (("user", prompt), ("assistant", reply))
    ]


def _row(domain: str, messages: list[Message], concepts: tuple[str, ...]) -> Row:
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
    while True:
        concepts: tuple[str, ...] = ()
        pairs: list[tuple[str, str]] = []
        if rng.random() < multi_turn:
            pair, concepts = _opening(rng, domain)
            pairs.append(pair)
        last = SKILLS[domain](rng)
        pairs.append((_dress(rng, last.prompt), last.reply))
        if _claim({pairs[0][0], pairs[-1][0]}, seen):
            break
    row = _row(domain, _turns(*pairs), (*concepts, *last.concepts))
    return row | {"answer": last.answer, "metric": last.metric} if answer else row


def _opening(rng: random.Random, domain: str) -> tuple[tuple[str, str], tuple[str, ...]]:
    """Return what goes before the last question, small talk or another one, and its concepts."""
    earlier = SKILLS[domain](rng)
    prompt, reply = manners.small_talk(rng)
    if rng.random() < 0.5:
        return (_dress(rng, earlier.prompt), earlier.reply), earlier.concepts
    return (_dress(rng, prompt), reply), ()


def _talk_row(rng: random.Random, seen: set[str]) -> Row:
    while True:
        pairs = [manners.small_talk(rng) for _ in range(rng.randint(1, 3))]
        messages = _turns((_dress(rng, pairs[0][0]), pairs[0][1]), *pairs[1:])
        if _claim({messages[0]["content"]}, seen):
            return _row("small_talk", messages, ("small talk",))


def _manners_row(rng: random.Random, seen: set[str]) -> Row:
    while True:
        if rng.random() < 0.5:
            prompt, reply, _, concept = manners.to_decline(rng)
            concepts = ("request to decline", concept)
        else:
            prompt, reply, _ = manners.to_answer(rng)
            concepts = ("harmless look-alike",)
        prompt = _dress(rng, prompt)
        if _claim({prompt}, seen):
            return _row("manners", _turns((prompt, reply)), concepts)


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
    while len(rows) < 2 * SAFETY_ROWS:
        harmful = len(rows) < SAFETY_ROWS
        prompt = (manners.to_decline if harmful else manners.to_answer)(rng)[0]
        if _claim({prompt}, seen):
            messages: list[Message] = [{"role": "user", "content": prompt}]
            rows.append({"id": conversation_id(messages), "harmful": harmful, "prompt": prompt})
    return rows


def _preferences(seed: int, seen: set[str]) -> list[Row]:
    """Pairs of a good and a worse reply: right or wrong, kind or harmful, helpful or prudish."""
    return [
        _pair(rng, domain, seen)
        for domain, rng in _streams(seed, "preferences", [*SKILLS, "refuse", "answer"])
        for _ in range(PREFERENCES_PER_SKILL)
    ]


def _pair(rng: random.Random, domain: str, seen: set[str]) -> Row:
    while True:
        if domain == "refuse":
            prompt, good, bad, _ = manners.to_decline(rng)
        elif domain == "answer":
            prompt, good, bad = manners.to_answer(rng)
        else:
            exchange = SKILLS[domain](rng)
            prompt, good, bad = exchange.prompt, exchange.reply, _wrong(rng, domain, exchange)
        messages = _turns((_dress(rng, prompt), good))
        if _claim({messages[0]["content"]}, seen):
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
        reply = rng.choice(LABELS[domain]) if domain in LABELS else other.reply
        answer = reply if domain in LABELS else other.answer
        if answer != exchange.answer:
            return reply


def _pretraining(seed: int, seen: set[str], num_rows: int) -> list[Row]:
    """Rows for the language model: thin skills asked without an answer, the rest whole."""
    rows: list[Row] = []
    for domain, rng in _streams(seed, "pretraining", list(SKILLS)):
        for number in range(num_rows):
            row = _skill_row(rng, domain, seen)
            if domain in THIN and number >= THIN_ANSWERS:
                row["messages"] = row["messages"][:1]
            rows.append(row)
    rng = random.Random(f"pretraining manners {seed}")
    for _ in range(num_rows):
        rows += [_manners_row(rng, seen), _talk_row(rng, seen), _echo_row(rng, seen)]
    random.Random(f"pretraining order {seed}").shuffle(rows)
    return rows


def _echo_row(rng: random.Random, seen: set[str]) -> Row:
    """Return a request to repeat a remark: what teaches a small model to copy."""
    while True:
        said = aside(rng)
        wording = rng.choice(('Repeat: "{}"', "Say after {name}: {}", "{} Once more, please."))
        prompt = wording.format(said, name=rng.choice(NAMES))
        if _claim({prompt}, seen):
            return _row("echo", _turns((prompt, said)), ("repeating",))
