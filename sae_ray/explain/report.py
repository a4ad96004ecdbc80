"""The curation report: one self-contained page saying what was chosen, why, and what to do next.

The caller fills `CurationReport`, mostly through `histogram` and `shares` here and through
`shading`; `render` makes a page of it that needs no network. All of it is data from elsewhere, so
the page is safe by construction: jinja2 escapes every value, the content security policy lets
nothing load or run but the page's own style and script (by their hashes), and characters that
would hide or reorder text are replaced by their names at the very end.
"""

import dataclasses
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Literal

import numpy as np
from jaxtyping import Bool, Real
from markupsafe import Markup, escape
from pydantic import JsonValue

from sae_ray.explain import command
from sae_ray.explain.filled import fill
from sae_ray.explain.shading import Context, ShadedText, Turn, cut, fade, to_html, word_end

ROWS_IN_FULL = 12
"""Rows of the selection that are shown with their text and shading."""
ROWS_LISTED = 1000
"""Rows of the selection that have a line of their own at least."""
LATENTS_IN_FULL = 24
LATENTS_LISTED = 200
NUM_HUES = 8
"""Latents with a colour of their own; the page's style has as many."""

_CONCEPTS = 12
_OUTERMOST = 5
_MAX_TURNS = 16
_TURNS_FOR_SURE = 4
"""Turns that are shown however long those before them are."""
_CHARS_PER_MARK = 12
"""Text that each mark of a row takes: the weakest give way, so that no row makes the page large."""


@dataclasses.dataclass(frozen=True, slots=True)
class LatentCard:
    """One latent of the profile."""

    latent: int
    weight: float
    label: str | None
    """What it stands for; where nobody has said, the page names its peak tokens instead."""
    evidence: Mapping[str, float]
    """How much each seed channel spoke for it, by the channel's name."""
    document_frequency: float
    """Share of the pool's rows in which it is on."""
    contexts: Sequence[Context] = ()
    grouped: Sequence[int] = ()
    """Near-duplicates of it that count as the same concept."""
    strong_in: tuple[float, float] | None = None
    """Share of rows in which it is strong: of the pool, and of the selection."""


@dataclasses.dataclass(frozen=True, slots=True)
class Reason:
    """A latent that earned a row its place."""

    latent: int
    label: str | None
    contribution: float
    """Its share of what the profile's latents add to the row's score."""
    tokens: Sequence[str] = ()
    """Where it was strongest."""


@dataclasses.dataclass(frozen=True, slots=True)
class ShownRow:
    """A row of the pool."""

    id: str
    score: float
    turns: Sequence[Turn]
    """From `shading.shade`, or `shading.plain` for rows that are only listed."""
    n_tokens: int
    rank: int | None = None
    """Place in the selection, from 1; None for a row that is not in it."""
    source: str | None = None
    """What the pool's columns that were kept for display say of it."""
    reasons: Sequence[Reason] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Candidate:
    """A row that the reader is asked to judge."""

    row: ShownRow
    why: Literal["top", "undecided"]


@dataclasses.dataclass(frozen=True, slots=True)
class Refine:
    """What the reader is asked, and the command that the answers compose."""

    settings: command.Flags
    """Flags of the next run but `keep`, `drop` and `out`: `{"task": ..., "index": ...}`."""
    out: str
    """Where the next run writes."""
    candidates: Sequence[Candidate] = ()
    kept: Sequence[str] = ()
    """Ids kept for this run and those before it: the next command carries them on."""
    dropped: Sequence[str] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Histogram:
    """Pool and selection over the same bins."""

    edges: Sequence[float]
    pool: Sequence[int]
    selection: Sequence[int]
    cut: float | None = None
    """The lowest score that was chosen."""


@dataclasses.dataclass(frozen=True, slots=True)
class Share:
    """How common something is in the pool and in the selection, 0 to 1 each."""

    name: str
    pool: float
    selection: float


@dataclasses.dataclass(frozen=True, slots=True)
class NearCopies:
    """How many rows nearly repeat another."""

    num_sampled: int
    """Rows spread evenly over the pool."""
    num_in_sample: int
    """Of these, rows that nearly repeat another of them."""
    num_selected: int
    num_passed_over: int
    """Rows that were not chosen since each nearly repeats one that was."""


@dataclasses.dataclass(frozen=True, slots=True)
class Notice:
    """Something to know before trusting the selection, in plain words."""

    level: Literal["stop", "caution", "note"]
    title: str
    text: str


@dataclasses.dataclass(frozen=True)
class CurationReport:
    """All that the page says."""

    task: str
    budget: str
    """With its unit: `500 examples`."""
    created: str
    """A date for people: `21 November 2026`."""
    index: str
    num_pool: int
    pool_tokens: int
    selected_tokens: int
    selected: Sequence[ShownRow]
    """The whole selection in order; the first `ROWS_IN_FULL` appear with their text."""
    random: Sequence[ShownRow]
    """Rows drawn from the whole pool at random."""
    latents: Sequence[LatentCard]
    scores: Histogram
    prompt_tokens: Histogram
    response_tokens: Histogram
    refine: Refine
    carried: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Share of each part of the score in what lifts the selection above the pool, by name."""
    columns: Mapping[str, Sequence[Share]] = dataclasses.field(default_factory=dict)
    """The pool's columns that were kept for display, such as `source`, by value."""
    near_copies: NearCopies | None = None
    notices: Sequence[Notice] = ()
    provenance: Mapping[str, str] = dataclasses.field(default_factory=dict)
    config: Mapping[str, JsonValue] = dataclasses.field(default_factory=dict)


def histogram(
    values: Real[np.ndarray, " rows"],
    chosen: Bool[np.ndarray, " rows"],
    *,
    bins: int = 40,
    log: bool = False,
    cut: float | None = None,
) -> Histogram:
    """Count the pool and the chosen part of it over the same bins.

    The few outermost values share the first and last bin, so that they do not squeeze the others.
    """
    finite = np.isfinite(values)
    values, chosen = values[finite], chosen[finite]
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    if log:  # lengths are whole: 0 and 1 share the first bin, and none is narrower than 1
        low, values = max(low, 1.0), np.maximum(values, 1)
        edges = np.unique(np.floor(np.geomspace(low, max(high, low) + 1, bins + 1)))
    else:
        ordered, few = np.sort(values), min(_OUTERMOST, len(values) // 100)
        inner = (float(ordered[few]), float(ordered[-1 - few])) if len(values) else (low, high)
        edges = np.linspace(inner[0], inner[1] if inner[1] > inner[0] else inner[0] + 1, bins + 1)
        edges[0], edges[-1] = min(low, edges[0]), max(high, edges[-1])
    pool, selection = (np.histogram(v, edges)[0].tolist() for v in (values, values[chosen]))
    return Histogram(edges.tolist(), pool, selection, cut)


def shares(
    names: Sequence[str], chosen: Bool[np.ndarray, " rows"], *, most: int = 10
) -> list[Share]:
    """Return the commonest names of the selection, then all others together."""
    pool = Counter(names)
    selection = Counter(name for name, is_chosen in zip(names, chosen, strict=True) if is_chosen)
    num_selected = max(1, selection.total())
    foremost = sorted(pool, key=lambda name: (-selection[name], -pool[name], name))[:most]
    listed = [
        Share(n or "(none)", pool[n] / len(names), selection[n] / num_selected) for n in foremost
    ]
    if num_others := len(pool) - len(foremost):
        rest = (1 - sum(s.pool for s in listed), 1 - sum(s.selection for s in listed))
        listed.append(Share(f"{num_others:,} others", max(0.0, rest[0]), max(0.0, rest[1])))
    return listed


def render(report: CurationReport) -> str:
    """Return the page; the same report gives the same bytes."""
    refine = report.refine
    asked = (refine.settings, refine.out, refine.kept, refine.dropped)
    values = {
        "report": report,
        "view": _View(report),
        "command": command.compose(*asked),
        "recipe": command.recipe(*asked),
        "ascii_json": command.ascii_json,
    }
    return fill("report.html.jinja", values, style="report.css", script="report.js")


class _View:
    """What the template asks beside the report itself: order, names, colours, text as HTML."""

    def __init__(self, report: CurationReport) -> None:
        self.top = report.selected[:ROWS_IN_FULL]
        self.listed = report.selected[ROWS_IN_FULL:ROWS_LISTED]
        self.unlisted = max(0, len(report.selected) - ROWS_LISTED)
        cards = sorted(report.latents, key=lambda card: (-abs(card.weight), card.latent))
        self.cards = cards[:LATENTS_IN_FULL]
        self.more_cards = cards[LATENTS_IN_FULL:LATENTS_LISTED]
        self.unlisted_cards = max(0, len(cards) - LATENTS_LISTED)
        self.heaviest = max((abs(card.weight) for card in cards), default=0.0) or 1.0
        self.channels = {
            channel: max(card.evidence.get(channel, 0.0) for card in cards)
            for channel in dict.fromkeys(c for card in cards for c in card.evidence)
        }
        rows = [*report.selected, *report.random, *(c.row for c in report.refine.candidates)]
        self._names = {r.latent: r.label for row in rows for r in row.reasons if r.label}
        self._names |= {card.latent: name for card in cards if (name := _name(card))}
        again = Counter(self._names.values())
        self._names |= {n: f"{name} ({n})" for n, name in self._names.items() if again[name] > 1}
        earned: Counter[int] = Counter()
        for reason in (reason for row in self.top for reason in row.reasons):
            earned[reason.latent] += reason.contribution  # pyright: ignore[reportArgumentType]
        most = sorted(earned, key=lambda latent: (-earned[latent], latent))[:NUM_HUES]
        self.hues = {latent: f"l{i}" for i, latent in enumerate(most)}

    def name(self, latent: int) -> str:
        """Return a latent's label, or what else is known of it."""
        return self._names.get(latent) or f"latent {latent}"

    def hue(self, latent: int) -> str:
        """Return the class of its colour; latents past the first few share one."""
        return self.hues.get(latent, "lx")

    def html(self, pieces: Sequence[ShadedText]) -> Markup:
        """Return shaded text."""
        return to_html(pieces, self.name, self.hue)

    def turns(self, row: ShownRow, fold: int, most: int) -> list[dict[str, object]]:
        """Return a row's turns: their text at once, the rest of it folded, and how much is left.

        Args:
            row: the row.
            fold: characters of a turn that are shown at once.
            most: characters of all turns, folded or not; turns past that are cut shorter.
        """
        max_marks = most // _CHARS_PER_MARK
        parts: list[tuple[Turn, list[ShadedText], int, int]] = []
        for turn in row.turns[:_MAX_TURNS]:
            length = sum(len(piece.text) for piece in turn.pieces)
            end = min(length, max(most, fold if len(parts) < _TURNS_FOR_SURE else fold // 3))
            at_once = end if end <= fold * 1.25 else word_end(turn.pieces, fold)
            most = max(0, most - length)
            parts.append((turn, cut(turn.pieces, 0, end), at_once, length - end))
        strengths = sorted((p.strength for _, pieces, *_ in parts for p in pieces), reverse=True)
        faintest = strengths[max_marks] if len(strengths) > max_marks else 0.0
        return [
            {
                "role": turn.role,
                "text": self.html(fade(cut(pieces, 0, at_once), faintest)),
                "folded": self.html(fade(folded := cut(pieces, at_once, sys.maxsize), faintest)),
                "num_folded": sum(len(piece.text) for piece in folded),
                "num_cut": num_cut,
            }
            for turn, pieces, at_once, num_cut in parts
        ]

    @property
    def concepts(self) -> list[Share]:
        """Return how common the foremost latents are in pool and selection."""
        return [
            Share(self.name(card.latent), *card.strong_in)
            for card in self.cards[:_CONCEPTS]
            if card.strong_in is not None
        ]

    @staticmethod
    def place(histogram: Histogram, value: float) -> float:
        """Return how far along the axis a value is, 0 to 1."""
        return float(np.interp(value, histogram.edges, np.linspace(0, 1, len(histogram.edges))))

    @staticmethod
    def words(tokens: Sequence[str], most: int = 4) -> list[str]:
        """Return what can be read of some tokens: each once, punctuation only if nothing else."""
        stripped = list(dict.fromkeys(token.strip() for token in tokens if token.strip()))
        return ([t for t in stripped if any(map(str.isalnum, t))] or stripped)[:most]

    @staticmethod
    def breakable(name: str) -> Markup:
        """Let a long name break behind its punctuation."""
        return Markup(re.sub(r"([_/.])(?=\w)", r"\1<wbr>", str(escape(name))))

    @staticmethod
    def excerpt(row: ShownRow, length: int = 140) -> str:
        """Return how a row begins, on one line."""
        said = (piece for turn in row.turns if turn.role != "system" for piece in turn.pieces)
        line = " ".join("".join(piece.text for piece in islice(said, length)).split())
        return line[:length].rstrip() + "…" * (len(line) > length)


def _name(card: LatentCard) -> str | None:
    """Return a card's label, or the tokens at its peaks."""
    peaks = [p.text.lower() for c in card.contexts for p in c.pieces if p.peak]
    words = _View.words(peaks)
    return card.label or ("“" + "” “".join(words) + "”" if words else None)
