"""Shaded text: conversations with the tokens marked at which latents are on.

What is shown is always the conversation's own text, to the character: a tokenizer's pieces are
only laid over it, so that bytes it cannot show alone, spaces it drops and turns it cut off do not
change what the reader sees.

This module writes HTML for pieces of text, and knows nothing of the page round them.
"""

import dataclasses
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, groupby

import numpy as np
from jaxtyping import Float
from markupsafe import Markup, escape

from sae_ray.chat import Conversation, Message
from sae_ray.curate.scorer import Trace

_FAINTEST = 0.1
"""Strength under which a token is not shaded: it would only be noise to the eye."""
_BEFORE_CHARS, _AFTER_CHARS = 90, 70
"""How much of a context stands on either side of the start of its peak."""
_LOOK_AHEAD_CHARS = 64
"""How far a token may lie behind the one before, where some in between could not be placed."""
_LONG_WORD_CHARS = 24
_SHADES = 5
_MARK = Markup('<mark class="{}" title="{}">{}</mark>')
_LINE_BREAK = re.compile(r"\s*\n\s*")


@dataclasses.dataclass(frozen=True, slots=True)
class ShadedText:
    """A piece of text, with the latent that is on there."""

    text: str
    latent: int | None = None
    activation: float = 0.0
    strength: float = 0.0
    """Activation as a share of what is strong for this latent, 0 to 1."""
    peak: bool = False
    """True on the strongest token of a context."""


@dataclasses.dataclass(frozen=True, slots=True)
class Turn:
    """One message in pieces."""

    role: str
    pieces: Sequence[ShadedText]


@dataclasses.dataclass(frozen=True, slots=True)
class Context:
    """A place in the pool where a latent is strongly on."""

    id: str
    pieces: Sequence[ShadedText]


def plain(conversation: Conversation) -> list[Turn]:
    """Return the turns without any shading."""
    return [Turn(m["role"], [ShadedText(m["content"])]) for m in conversation.messages]


def shade(
    conversation: Conversation,
    trace: Trace,
    latents: Sequence[int],
    scale: Float[np.ndarray, " chosen"],
) -> list[Turn]:
    """Mark each token by the latent that is strongest there for its own scale.

    Args:
        conversation: what is shown.
        trace: `LatentScorer.traces([conversation], latents)`.
        latents: the columns of the trace.
        scale: an activation that is strong for each of them, such as `stats.p99_on[latents]`.
    """
    turns: list[list[ShadedText]] = [[] for _ in conversation.messages]
    ends = [0] * len(turns)
    strengths = trace.latents / np.maximum(scale, 1e-6)
    for token, place in enumerate(_align(conversation.messages, trace.texts)):
        if place is None or not len(latents):
            continue
        column = int(strengths[token].argmax())
        strength = min(1.0, float(strengths[token, column]))
        if strength < _FAINTEST:
            continue
        turn, start, end = place
        content = conversation.messages[turn]["content"]
        if start > ends[turn]:
            turns[turn].append(ShadedText(content[ends[turn] : start]))
        activation = float(trace.latents[token, column])
        turns[turn].append(
            ShadedText(content[start:end], int(latents[column]), activation, strength)
        )
        ends[turn] = end
    for turn, message in enumerate(conversation.messages):
        turns[turn].append(ShadedText(message["content"][ends[turn] :]))
    return [Turn(m["role"], p) for m, p in zip(conversation.messages, turns, strict=True)]


def context(
    conversation: Conversation, trace: Trace, latents: Sequence[int], column: int, scale: float
) -> Context:
    """Cut out what stands round the peak of one latent, which is a column of the trace."""
    turns = shade(
        conversation,
        Trace(trace.texts, trace.latents[:, column : column + 1]),
        [latents[column]],
        np.asarray([scale], dtype=np.float32),
    )
    pieces = [piece for turn in turns for piece in (*turn.pieces, ShadedText("\n"))]
    peak = max(range(len(pieces)), key=lambda i: pieces[i].activation, default=0)
    if peak < len(pieces):
        pieces[peak] = dataclasses.replace(pieces[peak], peak=pieces[peak].latent is not None)
    at = sum(len(piece.text) for piece in pieces[:peak])
    total = sum(len(piece.text) for piece in pieces) - 1
    start = word_end(pieces, at - _BEFORE_CHARS) if at > _BEFORE_CHARS else 0
    end = word_end(pieces, at + _AFTER_CHARS) if at + _AFTER_CHARS < total else total
    shown = [
        dataclasses.replace(piece, text=_LINE_BREAK.sub(" ⏎ ", piece.text))
        for piece in cut(pieces, start, end)
    ]
    before, after = [ShadedText("…")] * (start > 0), [ShadedText("…")] * (end < total)
    return Context(conversation.id, [*before, *shown, *after])


def cut(pieces: Sequence[ShadedText], start: int, end: int) -> list[ShadedText]:
    """Return the characters from `start` to `end`."""
    kept: list[ShadedText] = []
    at = 0
    for piece in pieces:
        if at >= end:
            break
        text = piece.text[max(0, start - at) : max(0, end - at)]
        if text:
            whole = len(text) == len(piece.text)
            kept.append(piece if whole else dataclasses.replace(piece, text=text))
        at += len(piece.text)
    return kept


def word_end(pieces: Sequence[ShadedText], at: int) -> int:
    """Return the end of the last word before `at`; `at` itself where words are very long."""
    text = "".join(piece.text for piece in cut(pieces, max(0, at - _LONG_WORD_CHARS), at))
    return at - len(text) + len(text.rpartition(" ")[0]) if " " in text else at


def distinct(contexts: Sequence[Context], most: int) -> list[Context]:
    """Return the first contexts that do not repeat the words of one before."""
    kept: list[tuple[set[str], Context]] = []
    for candidate in contexts:
        words = set("".join(piece.text for piece in candidate.pieces).lower().split())
        if all(2 * len(words & seen) <= len(words | seen) for seen, _ in kept):
            kept.append((words, candidate))
    return [candidate for _, candidate in kept[:most]]


def fade(pieces: Sequence[ShadedText], strength: float) -> list[ShadedText]:
    """Take the shading off pieces that are no stronger than this."""
    return [p if p.latent is None or p.strength > strength else ShadedText(p.text) for p in pieces]


def to_html(
    pieces: Sequence[ShadedText], label: Callable[[int], str], hue: Callable[[int], str]
) -> Markup:
    """Return the pieces as escaped text and marks; neighbours that look alike become one."""
    html: list[str] = []
    for (latent, shade, peak), run in groupby(
        pieces, key=lambda p: (p.latent, min(_SHADES, 1 + int(p.strength * _SHADES)), p.peak)
    ):
        alike = list(run)
        text = escape("".join(piece.text for piece in alike))
        if latent is not None:
            title = f"{label(latent)} · {max(piece.activation for piece in alike):.2f}"
            classes = f"{hue(latent)} s{shade}" + " peak" * peak
            text = _MARK.format(classes, title, text)
        html.append(text)
    return Markup("").join(html)


def _align(
    messages: Sequence[Message], texts: Sequence[str]
) -> Iterator[tuple[int, int, int] | None]:
    """Place each token: its turn, start and end in it; None for one that cannot be found."""
    joined = "\n".join(message["content"] for message in messages)
    starts = list(accumulate((len(m["content"]) + 1 for m in messages), initial=0))
    at = 0
    for text in texts:
        word = text.strip()
        found = joined.find(word, at, at + len(word) + _LOOK_AHEAD_CHARS) if word else -1
        turn = bisect_right(starts, found) - 1
        if found < 0 or found + len(word) > starts[turn + 1] - 1:
            yield None
            continue
        at = found + len(word)
        yield turn, found - starts[turn], at - starts[turn]
