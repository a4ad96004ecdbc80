"""Answers: what an engine is asked, how much at once, and the pieces in which it answers."""

import dataclasses
import threading
from collections.abc import Callable
from typing import Literal

Finish = Literal["stop", "length", "cancelled", "failed"]
"""Why an answer ends: the model or a stop string ended it, it is as long as allowed, nobody waits
for it any more or the engine stopped, or its own expert gave no numbers to choose a token by."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and when there are enough."""

    max_tokens: int | None = None
    """All that the context has room for, unless given."""
    temperature: float = 1.0
    """0 takes the likeliest token each time."""
    top_p: float = 1.0
    """Only the likeliest tokens that together have this probability are drawn from."""
    seed: int | None = None
    """The same seed draws the same answer, whoever else is in the batch, up to rounding."""
    stop: tuple[str, ...] = ()
    """Strings that end the answer; they are not part of it."""
    top_logprobs: int | None = None
    """How many of the likeliest tokens are told at each place; none, not even the one chosen,
    unless given."""


@dataclasses.dataclass(frozen=True)
class Ask:
    """One prompt, and who is to answer it."""

    ids: tuple[int, ...]
    """Tokens of the prompt."""
    experts: tuple[str, ...] = ()
    """Ids of experts; none stands for the base. The logits of several are averaged."""
    weights: tuple[float, ...] = ()
    """Of the experts in that average; they need not sum to 1."""
    sampling: Sampling = Sampling()


@dataclasses.dataclass(frozen=True)
class Token:
    """A token of an answer with its logarithmic probability, and the likeliest at its place."""

    text: str
    logprob: float
    offset: int
    """Where it begins in the answer's text, in characters."""
    top: tuple[tuple[str, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Piece:
    """What an answer grows by."""

    text: str
    num_tokens: int
    tokens: tuple[Token, ...] = ()
    """With their probabilities, where these were asked for."""
    finish: Finish | None = None
    """Set in the last piece."""


class Ticket:
    """An answer in the making: who asked keeps it, to cancel what nobody waits for."""

    def __init__(self, ask: Ask, hand_over: Callable[[Piece], None]) -> None:
        self.ask = ask
        self.hand_over = hand_over
        """Called with every piece, by the thread that runs the engine."""
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """Ask the engine to stop; its last piece says `cancelled`."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        """Say whether it was cancelled."""
        return self._cancelled.is_set()


@dataclasses.dataclass(frozen=True)
class Limits:
    """How much an engine takes on at once."""

    max_rows: int = 32
    """Rows of the batch."""
    max_waiting: int = 64
    """Requests that may wait for a place in it."""
    prefill_tokens: int = 2048
    """Tokens of prompts, padding included, that are read between two steps of the others, where
    more than one prompt waits."""
    adapter_memory_mb: float = 2048.0
    """What all experts in memory may take."""
    kv_memory_mb: float = 4096.0
    """What the keys and values of all rows may take: a row that would go beyond waits again."""


@dataclasses.dataclass(frozen=True)
class Load:
    """What an engine is busy with."""

    rows: int
    waiting: int
    tokens: int
    """Answered since it began."""
    residents: int
    adapter_bytes: int
