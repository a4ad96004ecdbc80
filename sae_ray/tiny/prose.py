"""Plain prose of the harbour town, without any chat template."""

import random

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
    VELAN,
    aside,
    plural,
)

_SENTENCES = (
    "On {day} {name} went to the {place} with a {thing}.",
    "{name} {past} the {thing}, and {other} {past2} the {thing2}.",
    "The {place} was {good}, but the {thing} was {bad}.",
    "They made {dish} together, because {other} was hungry.",
    "A {noun} stood by the {place} and {name} looked at it for a long time.",
    "There were {number} {things} in the store and {number2} {things2} outside.",
    '"Did you see my {thing}?" asked {name}. "It is at the {place}," said {other}.',
    "In the evening {name} told a story about a {noun} and a {good} {thing}.",
    "Nobody at the {place} knew why the {things} were gone.",
    "{other} laughed, and {name} put the {thing} back where it belonged.",
    "First {name} would {step}, and only then {step2}.",
    "It rained, so the {noun} stayed at the {place} until {day}.",
)


def paragraph(rng: random.Random) -> str:
    """Return a few sentences about two people of the town."""
    name, other = rng.sample(NAMES, 2)
    lines: list[str] = []
    for _ in range(rng.randint(4, 9)):
        thing, thing2 = rng.sample(THINGS, 2)
        dish = rng.choice(list(DISHES))
        step, step2 = sorted(rng.sample(range(5), 2))
        kind = KIND_OF[thing]
        words = {
            "name": name,
            "other": other,
            "place": rng.choice(PLACES),
            "day": rng.choice(DAYS),
            "thing": thing,
            "thing2": thing2,
            "things": plural(thing),
            "things2": plural(rng.choice(GOODS[kind])),
            "past": rng.choice(list(PAST.values())),
            "past2": rng.choice(list(PAST.values())),
            "good": rng.choice(TONES["delighted"] + TONES["content"]),
            "bad": rng.choice(TONES["bored"] + TONES["annoyed"]),
            "dish": dish,
            "step": DISHES[dish][step],
            "step2": DISHES[dish][step2],
            "noun": rng.choice(list(VELAN["noun"])),
            "number": rng.randint(2, 19),
            "number2": rng.randint(2, 19),
        }
        lines.append(rng.choice(_SENTENCES).format(**words) if rng.random() < 0.85 else aside(rng))
    return " ".join(lines)


def chronicle(seed: int, num_characters: int) -> list[str]:
    """Return pages of prose, of about 2,000 characters each, until there are enough."""
    rng = random.Random(f"prose {seed}")
    pages: list[str] = []
    while sum(map(len, pages)) < num_characters:
        pages.append("\n\n".join(paragraph(rng) for _ in range(5)))
    return pages
