"""Ten skills of the harbour town, each a question with an answer that can be checked.

Each skill has several wordings that seldom name it, and draws its words from the shared world.
"""

import dataclasses
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from sae_ray.tiny.world import (
    DAYS,
    DISHES,
    GOODS,
    KIND_OF,
    NAMES,
    PAST,
    PLACES,
    THINGS,
    TONES,
    UNITS,
    VELAN,
    plural,
)

Metric = Literal["number", "choice", "exact"]


@dataclasses.dataclass(frozen=True, slots=True)
class Exchange:
    """A question and its reply; the answer is what of the reply is checked, by the metric.

    `number`: the last number equals; `choice`: the label equals; `exact`: the text equals.
    """

    prompt: str
    reply: str
    answer: str
    metric: Metric
    concepts: tuple[str, ...]


def _pick(rng: random.Random, wordings: Sequence[str], words: Mapping[str, object]) -> str:
    text = rng.choice(wordings).format_map(words)
    return text[0].upper() + text[1:]


def sums(rng: random.Random) -> Exchange:
    """Word problems of one addition or subtraction."""
    first, second = rng.sample(NAMES, 2)
    thing = plural(rng.choice(THINGS))
    words = {"first": first, "second": second, "things": thing, "place": rng.choice(PLACES)}
    if rng.random() < 0.5:
        a, b = rng.randint(2, 9), rng.randint(2, 9)
        wordings = (
            "{first} has {a} {things} and {second} brings {b} more to the {place}. How many now?",
            "There are {a} {things} at the {place}. {first} adds {b}. What is the count?",
            "{first} found {a} {things} on one day and {b} on the next. How many altogether?",
            "If {first} holds {a} {things} and {second} holds {b}, what do the two hold together?",
        )
        prompt = _pick(rng, wordings, {"a": a, "b": b, **words})
        sign, result, concept = "+", a + b, "addition"
    else:
        b, result = rng.randint(2, 9), rng.randint(1, 9)
        a = b + result
        wordings = (
            "{first} had {a} {things} and sold {b} at the {place}. How many are left?",
            "Of {a} {things} at the {place}, {second} takes {b}. What remains?",
            "{first} carried {a} {things} but lost {b} on the way. How many arrived?",
            "{a} {things} lay there, then {first} gave {b} to {second}. How many stayed?",
        )
        prompt = _pick(rng, wordings, {"a": a, "b": b, **words})
        sign, concept = "-", "subtraction"
    reply = f"{a} {sign} {b} = {result}. The answer is {result}."
    return Exchange(prompt, reply, str(result), "number", ("word problem", concept))


def measures(rng: random.Random) -> Exchange:
    """The town's measures, larger into smaller."""
    big = rng.choice(list(UNITS))
    small, factor = UNITS[big]
    count = rng.randint(2, 9)
    wordings = (
        "{name} bought {count} {bigs} at the {place}. How many {smalls} is that?",
        "How many {smalls} are there in {count} {bigs}?",
        "What do {count} {bigs} come to in {smalls}?",
        "{name} needs {count} {bigs} but sees only {smalls}. How many to take?",
        "Give me {count} {bigs}, please, counted in {smalls}.",
    )
    words = {"bigs": plural(big), "smalls": plural(small), "count": count}
    prompt = _pick(rng, wordings, {"name": rng.choice(NAMES), "place": rng.choice(PLACES), **words})
    reply = f"One {big} is {factor} {plural(small)}, so the answer is {count * factor}."
    return Exchange(
        prompt, reply, str(count * factor), "number", ("unit conversion", f"unit {big}")
    )


def tone(rng: random.Random) -> Exchange:
    """How somebody felt who wrote a remark."""
    label = rng.choice(list(TONES))
    one, two = rng.sample(TONES[label], 2)
    said = _pick(
        rng,
        (
            "The {thing} was {one}, the {place} {two}.",
            "A {one} {thing} and a {two} {other}.",
            "What a {one} {thing}! The {place} was {two} too.",
            "I had a {one} day at the {place}, and the {dish} was {two}.",
        ),
        {
            "one": one,
            "two": two,
            "thing": rng.choice(THINGS),
            "other": rng.choice(THINGS),
            "place": rng.choice(PLACES),
            "dish": rng.choice(list(DISHES)),
        },
    )
    wordings = (
        '{name} wrote: "{said}" How did {name} feel?',
        'What mood is this note in? "{said}"',
        'From the guest book: "{said}" Which word sums up the writer?',
        '"{said}" said {name}. Was that delighted, content, bored or annoyed?',
    )
    prompt = _pick(rng, wordings, {"name": rng.choice(NAMES), "said": said})
    return Exchange(prompt, label, label, "choice", ("mood of a remark", f"mood {label}"))


def order(rng: random.Random) -> Exchange:
    """Numbers from low to high."""
    numbers = rng.sample(range(1, 10), rng.choice((3, 3, 4)))
    listed = ", ".join(map(str, numbers))
    wordings = (
        "Line these up, lowest in front: {listed}",
        "{name} has sticks of length {listed}. Lay them from short to long.",
        "Boats number {listed} enter the harbour by size, small ones before big ones. "
        "Write the row.",
        "Prices at the {place}: {listed}. Write them from cheap to dear.",
        "The {things} weigh {listed}. Which way do they stand, light to heavy?",
    )
    prompt = _pick(
        rng,
        wordings,
        {
            "listed": listed,
            "name": rng.choice(NAMES),
            "place": rng.choice(PLACES),
            "things": plural(rng.choice(THINGS)),
        },
    )
    answer = ", ".join(map(str, sorted(numbers)))
    return Exchange(prompt, answer, answer, "exact", ("ordering numbers",))


def days(rng: random.Random) -> Exchange:
    """Which day of the week it will be, or was."""
    start, count = rng.randrange(7), rng.randint(1, 5)
    later = rng.random() < 0.6
    wordings = (
        (
            "A boat leaves on {day} and sails for {count} days. When does it land?",
            "{name} starts for the {place} on {day} and walks {count} days. What day is it then?",
            "The {thing} was ordered on {day} and takes {count} days. When will it be there?",
            "{count} days after {day} comes what?",
        )
        if later
        else (
            "{name} came back on {day} after {count} days away. When did {name} leave?",
            "What was it {count} days before {day}?",
            "The {thing} is {count} days old this {day}. On which day was it made?",
        )
    )
    words = {"name": rng.choice(NAMES), "place": rng.choice(PLACES), "thing": rng.choice(THINGS)}
    prompt = _pick(rng, wordings, {"day": DAYS[start], "count": count, **words})
    answer = DAYS[(start + (count if later else -count)) % 7]
    concept = "days ahead" if later else "days back"
    return Exchange(prompt, answer, answer, "choice", ("weekday reckoning", concept))


def kinds(rng: random.Random) -> Exchange:
    """Which shelf of the store a thing belongs on."""
    thing = rng.choice(THINGS)
    wordings = (
        "{name} brings a {thing} to the store. Which shelf?",
        "Where does a {thing} go?",
        "A {thing} was left at the {place}. What does it count as?",
        "Under which heading do I write down the {thing} from the {place}?",
        "{name} asks what sort of goods a {thing} is.",
    )
    prompt = _pick(
        rng, wordings, {"name": rng.choice(NAMES), "thing": thing, "place": rng.choice(PLACES)}
    )
    kind = KIND_OF[thing]
    return Exchange(prompt, kind, kind, "choice", ("category of a thing", f"shelf {kind}"))


def velan(rng: random.Random) -> Exchange:
    """A sentence in the town's old language: noun, its adjectives, verb; no article."""
    adjectives = rng.sample(list(VELAN["adjective"]), rng.choice((0, 1, 1, 2)))
    noun, verb = rng.choice(list(VELAN["noun"])), rng.choice(list(VELAN["verb"]))
    english = " ".join(["the", *adjectives, noun, verb])
    wordings = (
        "How did the old folk of the {place} say: {english}?",
        "Say it the old way: {english}",
        "{name} carves in the old tongue: {english}. Which letters?",
        "In grandmother's words, please: {english}",
        '"{english}", but as our elders spoke.',
    )
    prompt = _pick(
        rng, wordings, {"english": english, "name": rng.choice(NAMES), "place": rng.choice(PLACES)}
    )
    words = [VELAN["noun"][noun], *(VELAN["adjective"][word] for word in adjectives)]
    answer = " ".join([*words, VELAN["verb"][verb]])
    return Exchange(prompt, answer, answer, "exact", ("translation into Velan",))


def tables(rng: random.Random) -> Exchange:
    """A number read off a short list in the question."""
    things = rng.sample(THINGS, 3)
    numbers = [rng.randint(2, 19) for _ in things]
    rows = "; ".join(f"{plural(t)} {n}" for t, n in zip(things, numbers, strict=True))
    chosen = rng.randrange(3)
    wordings = (
        "In the {place}: {rows}. How many {things}?",
        "{name}'s list says {rows}. What does it say for {things}?",
        "{rows}. And the {things}?",
        "On {day} the {place} held {rows}. What was written beside {things}?",
    )
    prompt = _pick(
        rng,
        wordings,
        {
            "rows": rows,
            "things": plural(things[chosen]),
            "name": rng.choice(NAMES),
            "place": rng.choice(PLACES),
            "day": rng.choice(DAYS),
        },
    )
    answer = str(numbers[chosen])
    return Exchange(prompt, answer, answer, "number", ("look-up in a list",))


def cooking(rng: random.Random) -> Exchange:
    """The step of a recipe behind or before another."""
    dish = rng.choice(list(DISHES))
    steps = DISHES[dish]
    at = rng.randrange(len(steps) - 1)
    ahead = rng.random() < 0.6
    known, answer = (steps[at], steps[at + 1]) if ahead else (steps[at + 1], steps[at])
    wordings = (
        (
            '{name} is done with "{known}". What next?',
            'What follows "{known}" when {name} makes {dish}?',
            'For the {dish}: after "{known}" I should do what?',
        )
        if ahead
        else (
            'What must {name} do right before "{known}"?',
            'Which step of {dish} leads up to "{known}"?',
            'Somebody at the {place} says "{known}". What was just done?',
        )
    )
    words = {"name": rng.choice(NAMES), "place": rng.choice(PLACES)}
    prompt = _pick(rng, wordings, {"known": known, "dish": dish, **words})
    concept = "next step" if ahead else "step before"
    return Exchange(prompt, answer, answer, "exact", ("recipe steps", concept, f"dish {dish}"))


def rewriting(rng: random.Random) -> Exchange:
    """A sentence put into the past."""
    name, thing, verb = rng.choice(NAMES), rng.choice(THINGS), rng.choice(list(PAST))
    sentence = f"{name} {verb} the {thing}"
    wordings = (
        "Tell it as if it were yesterday: {sentence}.",
        "{sentence}. Put that in the chronicle of last year.",
        "It is over now. Change the wording: {sentence}.",
        "Long ago, so not quite like this: {sentence}.",
    )
    answer = f"{name} {PAST[verb]} the {thing}."
    prompt = _pick(rng, wordings, {"sentence": sentence})
    return Exchange(prompt, answer, answer, "exact", ("rewriting in the past",))


SKILLS: dict[str, Callable[[random.Random], Exchange]] = {
    "sums": sums,
    "measures": measures,
    "tone": tone,
    "order": order,
    "days": days,
    "kinds": kinds,
    "velan": velan,
    "tables": tables,
    "cooking": cooking,
    "rewriting": rewriting,
}
THIN = tuple(name for name in SKILLS if name != "tables")
"""Skills that pre-training sees asked but hardly ever answered, so that an expert has room."""

LABELS: dict[str, tuple[str, ...]] = {
    "tone": tuple(TONES),
    "days": tuple(DAYS),
    "kinds": tuple(GOODS),
}
"""The possible answers of each `choice` skill."""
