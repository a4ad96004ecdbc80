"""The harbour town that all generated conversations speak of: its words, and what each is about.

Domains share these words on purpose. Names, goods, places, days and dishes turn up in every
domain, and so do remarks in passing that hold the key words of the others, so that a domain
cannot be told by its vocabulary alone.
"""

import dataclasses
import random
import re
from collections.abc import Sequence

NAMES = [
    "Ana",
    "Tom",
    "Mira",
    "Otto",
    "Lena",
    "Jonas",
    "Petra",
    "Felix",
    "Ida",
    "Karl",
    "Nora",
    "Emil",
    "Vera",
    "Hugo",
    "Rosa",
    "Leo",
    "Clara",
    "Max",
    "Ella",
    "Finn",
]

PLACES = [
    "harbour",
    "market",
    "mill",
    "school",
    "library",
    "station",
    "bakery",
    "workshop",
    "garden",
    "bridge",
    "inn",
    "tower",
]

DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]

GOODS: dict[str, list[str]] = {
    "tools": ["hammer", "saw", "chisel", "drill", "spanner", "pliers", "rake", "spade"],
    "kitchenware": ["kettle", "ladle", "bowl", "plate", "whisk", "sieve", "tray", "jug"],
    "clothing": ["coat", "scarf", "glove", "boot", "hat", "shirt", "apron", "belt"],
    "food": ["apple", "loaf", "carrot", "onion", "cheese", "pear", "plum", "potato"],
    "stationery": ["pencil", "ruler", "notebook", "envelope", "stamp", "map", "ink", "folder"],
    "sailing": ["rope", "sail", "anchor", "oar", "net", "buoy", "compass", "lantern"],
    "toys": ["kite", "doll", "puzzle", "drum", "whistle", "marble", "puppet", "ball"],
}
"""Goods by the shelf they belong on."""

KIND_OF = {thing: kind for kind, things in GOODS.items() for thing in things}
THINGS = list(KIND_OF)

DISHES: dict[str, list[str]] = {
    "soup": [
        "wash the leeks",
        "chop the leeks",
        "boil the stock",
        "simmer the pot",
        "add the cream",
    ],
    "bread": ["warm the water", "mix the dough", "knead the dough", "let it rise", "bake the loaf"],
    "omelette": [
        "crack the eggs",
        "beat the eggs",
        "heat the butter",
        "pour the mix",
        "fold it over",
    ],
    "salad": [
        "rinse the leaves",
        "tear the leaves",
        "slice the radish",
        "shake the oil",
        "toss it all",
    ],
    "pancakes": [
        "sift the flour",
        "stir in milk",
        "rest the batter",
        "grease the pan",
        "flip each one",
    ],
    "jam": [
        "pick the berries",
        "crush the berries",
        "weigh the sugar",
        "cook the pulp",
        "fill the jars",
    ],
    "tea": [
        "fill the kettle",
        "warm the cup",
        "measure the herbs",
        "pour the water",
        "wait a while",
    ],
    "dumplings": [
        "mince the meat",
        "roll the sheets",
        "cut the rounds",
        "seal the edges",
        "steam them all",
    ],
}
"""How each dish is made in this town, step by step."""

UNITS: dict[str, tuple[str, int]] = {
    "crate": ("box", 4),
    "barrel": ("bucket", 3),
    "span": ("hand", 5),
    "watch": ("bell", 8),
    "sack": ("scoop", 6),
    "coil": ("fathom", 7),
}
"""The town's measures: one crate is 4 boxes, and so on."""

TONES: dict[str, list[str]] = {
    "delighted": [
        "wonderful",
        "splendid",
        "marvellous",
        "brilliant",
        "superb",
        "dazzling",
        "perfect",
        "glorious",
    ],
    "content": ["decent", "pleasant", "agreeable", "tidy", "handy", "fair", "useful", "nice"],
    "bored": ["dull", "bland", "plain", "tedious", "ordinary", "flat", "grey", "sleepy"],
    "annoyed": ["awful", "broken", "rude", "dreadful", "useless", "filthy", "shoddy", "horrid"],
}

PAST: dict[str, str] = {
    "carries": "carried",
    "finds": "found",
    "sells": "sold",
    "mends": "mended",
    "hides": "hid",
    "buys": "bought",
    "cleans": "cleaned",
    "brings": "brought",
    "paints": "painted",
    "borrows": "borrowed",
}

VELAN: dict[str, dict[str, str]] = {
    "adjective": {
        "red": "tal", "old": "mor", "small": "pim", "bright": "zel", "heavy": "gor", "blue": "nif",
        "clean": "sul", "round": "oba",
    },
    "noun": {
        "boat": "keru", "baker": "domi", "horse": "vasha", "child": "lilo", "captain": "torin",
        "bird": "fepi", "tailor": "hamu", "dog": "rusk",
    },
    "verb": {
        "sleeps": "nenar", "sings": "lalar", "waits": "dudar", "runs": "zipar", "falls": "botar",
        "works": "kirar", "laughs": "hihar", "swims": "wawar",
    },
}  # fmt: skip
"""The town's old language, in which the adjective follows its noun."""

ASIDES = (
    "{name} was sorting things by shelf at the {place} while the {dish} cooked.",
    "By the way, {name} counts every {thing} twice.",
    "It is {day} and the {place} is busy.",
    "{name} says the {dish} at the {place} is {tone}.",
    "I am writing from the {place}.",
    "{name} used to speak old Velan at home.",
    "We moved a {unit} of goods on {day}.",
    "The list by the door of the {place} is long.",
    "Yesterday {name} {past} a {thing}.",
    "My neighbour {name} keeps a diary, and a {thing}.",
    "First things first, as {name} says.",
    "How much {name} likes that {thing}!",
    "The {tone} {thing} is still at the {place}.",
    "{name} has {number} of them, smallest first.",
    "Please and thank you, as they say at the {place}.",
    "On {day} the timetable changes again.",
)
"""Remarks that belong to no domain and mention the words of all."""


def aside(rng: random.Random) -> str:
    """Return one remark in passing."""
    return rng.choice(ASIDES).format(
        name=rng.choice(NAMES),
        place=rng.choice(PLACES),
        day=rng.choice(DAYS),
        dish=rng.choice(list(DISHES)),
        thing=rng.choice(THINGS),
        unit=rng.choice(list(UNITS)),
        tone=rng.choice(rng.choice(list(TONES.values()))),
        past=rng.choice(list(PAST.values())),
        number=rng.randint(2, 9),
    )


def plural(thing: str) -> str:
    """Return the plural of a word of this town."""
    irregular = {"loaf": "loaves", "box": "boxes", "potato": "potatoes", "watch": "watches"}
    if thing in ("pliers", "ink", "cheese", "stationery"):
        return f"pieces of {thing}" if thing != "pliers" else thing
    return irregular.get(thing, thing + ("es" if thing.endswith(("sh", "ch", "ss", "x")) else "s"))


def _vocabulary() -> dict[str, str]:
    words: dict[str, str] = {}
    for kind, things in GOODS.items():
        for thing in things:
            words[thing] = words[plural(thing)] = kind
    for tone, adjectives in TONES.items():
        words.update(dict.fromkeys(adjectives, f"{tone} word"))
    for big, (small, _) in UNITS.items():
        for unit in (big, plural(big), small, plural(small)):
            words[unit] = "measure"
    for english in VELAN.values():
        words.update(dict.fromkeys(english.values(), "velan word"))
    words.update(dict.fromkeys(NAMES, "person"))
    words.update(dict.fromkeys(PLACES, "place"))
    words.update(dict.fromkeys(DAYS, "day of the week"))
    words.update(dict.fromkeys(DISHES, "dish"))
    words.update(dict.fromkeys(PAST, "present verb"))
    words.update(dict.fromkeys(PAST.values(), "past verb"))
    words.update(dict.fromkeys(("Sorry", "sorry", "cannot"), "apology"))
    words.update(dict.fromkeys(("Please", "please", "thank", "Thank"), "courtesy"))
    return words


CONCEPT_OF_WORD = _vocabulary()
_WORD = re.compile(r"[A-Za-z]+|\d+")


@dataclasses.dataclass(frozen=True, slots=True)
class Span:
    """A word of a message and the concept that it stands for."""

    message: int
    start: int
    end: int
    concept: str


def spans(contents: Sequence[str]) -> list[Span]:
    """Find the words whose concept is known, and numbers, in the turns of a conversation."""
    found: list[Span] = []
    for number, content in enumerate(contents):
        for match in _WORD.finditer(content):
            word = match[0]
            concept = "number" if word.isdigit() else CONCEPT_OF_WORD.get(word)
            if concept is not None:
                found.append(Span(number, match.start(), match.end(), concept))
    return found
