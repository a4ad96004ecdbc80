"""Examples: conversations and preference pairs as token ids, with a mark on what is to be learnt.

What is learnt is every assistant turn and the one token behind it, which ends the turn; the prompt
and the template are read and never learnt. A row that cannot teach is rejected with its reason.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import numpy as np
from jaxtyping import Bool, Int32

from sae_ray.chat import ChatTokenizer, Conversation, Kind, Tokens, Unreadable
from sae_ray.errors import PoolError
from sae_ray.pairs import to_pair
from sae_ray.pool import plan
from sae_ray.rows import BadRow, Rejected, count_reasons, to_conversation
from sae_ray.tables import read_rows

TOO_LONG = "reply longer than the context"


@dataclasses.dataclass(frozen=True, slots=True)
class Example:
    """One sequence, and which of its tokens are learnt."""

    id: str
    ids: Int32[np.ndarray, " tokens"]
    learnt: Bool[np.ndarray, " tokens"]

    @property
    def content(self) -> bytes:
        """Return what it says: the same for a row that is there again by another id."""
        return self.ids.tobytes()


@dataclasses.dataclass(frozen=True, slots=True)
class PairExample:
    """Two sequences with the same prompt; what is learnt of each is its last reply."""

    id: str
    chosen: Example
    rejected: Example

    @property
    def content(self) -> bytes:
        """Return what it says: the same for a pair that is there again by another id."""
        return b"|".join((self.chosen.content, self.rejected.content))


AnyExample = TypeVar("AnyExample", Example, PairExample)


@dataclasses.dataclass(frozen=True)
class Examples(Generic[AnyExample]):
    """Rows that can be learnt from, those that cannot, and what they are of."""

    rows: list[AnyExample]
    rejected: list[Rejected]
    fingerprint: str
    """Of the pool they were read from."""


def read_examples(
    source: str,
    tokenizer: ChatTokenizer,
    *,
    max_tokens: int,
    max_rows: int | None = None,
    staging: str | None = None,
) -> Examples[Example]:
    """Read the conversations of a pool.

    Raises:
        PoolError: the pool cannot be read, or holds nothing to learn from.
    """

    def read(row: dict) -> Example:
        conversation = to_conversation(row)
        return _example(conversation, tokenizer, max_tokens, every_turn=True)

    return _read(source, read, max_rows, staging)


def read_pairs(
    source: str,
    tokenizer: ChatTokenizer,
    *,
    max_tokens: int,
    max_rows: int | None = None,
    staging: str | None = None,
) -> Examples[PairExample]:
    """Read the preference pairs of a pool.

    Raises:
        PoolError: the pool cannot be read, or holds nothing to learn from.
    """

    def read(row: dict) -> PairExample:
        pair = to_pair(row)
        chosen, rejected = (
            _example(one, tokenizer, max_tokens, every_turn=False)
            for one in (pair.chosen, pair.rejected)
        )
        start = int(np.argmax(chosen.learnt))
        if not np.array_equal(chosen.ids[:start], rejected.ids[:start]):
            raise BadRow("tokens of the prompt depend on the reply", pair.id)
        return PairExample(pair.id, chosen, rejected)

    return _read(source, read, max_rows, staging)


def split(
    rows: Sequence[AnyExample], num_held_out: int, seed: int
) -> tuple[list[AnyExample], list[AnyExample]]:
    """Divide rows into those to learn from and those held out, by their ids alone."""

    def place(row: AnyExample) -> bytes:
        return hashlib.sha256(f"{seed}:{row.id}".encode()).digest()

    held = {id(row) for row in sorted(rows, key=place)[:num_held_out]}
    return [row for row in rows if id(row) not in held], [row for row in rows if id(row) in held]


def _read(
    source: str, read: Callable[[dict], AnyExample], max_rows: int | None, staging: str | None
) -> Examples[AnyExample]:
    planned = plan(source, staging=staging)
    parts = [part for part in planned.slices if max_rows is None or part.first_row < max_rows]
    rows: list[AnyExample] = []
    rejected: list[Rejected] = []
    for part in parts:
        for number, row in enumerate(read_rows(part), part.first_row):
            if number == max_rows:
                break
            try:
                if isinstance(row, BadRow):
                    raise row
                rows.append(read(row))
            except BadRow as bad:
                given = row.get("id") if isinstance(row, dict) else None
                id = None if given is None else str(given)
                rejected.append(Rejected(number, id, bad.reason, bad.excerpt))
    if not rows:
        reasons = "; ".join(f"{why}: {n}" for why, n in count_reasons(rejected).items())
        raise PoolError(
            f"{source} holds nothing to learn from ({reasons}): give conversations with an "
            "assistant turn, or preference pairs for dpo"
        )
    return Examples(rows, rejected, planned.fingerprint)


def _example(
    conversation: Conversation, tokenizer: ChatTokenizer, max_tokens: int, *, every_turn: bool
) -> Example:
    (tokens,) = tokenizer.tokenize([conversation], max_tokens + 1)
    if isinstance(tokens, Unreadable):
        raise BadRow("the chat template refuses it", tokens.reason)
    learnt = _learnt(tokens)
    if not every_turn:
        # Of earlier turns there is nothing to choose between.
        ends = np.flatnonzero(~learnt)
        last = np.flatnonzero(learnt)[-1] if learnt.any() else -1
        learnt[: ends[ends < last][-1] + 1 if (ends < last).any() else 0] = False
    if not learnt.any():
        reason = TOO_LONG if tokens.truncated else "no reply among its tokens"
        raise BadRow(reason, conversation.id)
    end = int(np.flatnonzero(learnt)[-1]) + 1
    if len(tokens) > max_tokens and (tokens.truncated or end > max_tokens):
        raise BadRow(TOO_LONG, f"{len(tokens)} tokens or more, {max_tokens} allowed")
    # What the template adds behind the last reply would only be padding.
    return Example(conversation.id, tokens.ids[:end], learnt[:end])


def _learnt(tokens: Tokens) -> Bool[np.ndarray, " tokens"]:
    """Mark assistant turns, and the token behind each: without it a model never learns to stop."""
    learnt = tokens.response.copy()
    behind = np.flatnonzero(tokens.response[:-1] & ~tokens.response[1:]) + 1
    learnt[behind[tokens.kinds[behind] != Kind.CONTENT]] = True
    return learnt
