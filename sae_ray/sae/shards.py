"""InstanceReader: slices of a pool as instances, when their turn comes; bad rows are counted.

    reader = InstanceReader(tokenizer)
    stream = ActivationStream(model, reader.shards(plan.slices))

For `bt_p` the instances are plain text: a row's column `text`, or what was said in its turns,
without any template.
"""

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from sae_ray.chat import ChatTokenizer, Conversation, Message
from sae_ray.errors import PoolError
from sae_ray.rows import MAX_CHARS, BadRow, Rejected, count_reasons, excerpt, to_conversation
from sae_ray.sae.activations import Shard
from sae_ray.sae.sequences import CONVERSATION, Lanes, chat_instances, text_instances
from sae_ray.tables import Slice, read_rows

_CACHED_TOKENS = 16_000_000
"""Tokens of instances that are kept for the next pass: 256 MB."""
_JUDGED_ROWS = 200
"""Rows from which the share of rejected ones is looked at."""


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One row that can be read."""

    number: int
    """In the pool."""
    conversation: Conversation
    """Of a plain text, one turn that nobody says."""
    is_text: bool

    @property
    def turns(self) -> list[str]:
        """Return what was said."""
        return [message["content"] for message in self.conversation.messages]


def read_texts(part: Slice, *, plain_text: bool) -> Iterator[Row | Rejected]:
    """Yield a slice's conversations, or plain texts where a row has them and they are wanted."""
    columns = ("text",) if plain_text else ()
    for number, raw in enumerate(read_rows(part, columns), part.first_row):
        try:
            if isinstance(raw, BadRow):
                raise raw
            if plain_text and raw.get("text") is not None:
                yield Row(number, _plain(raw["text"]), is_text=True)
            else:
                yield Row(number, to_conversation(raw), is_text=False)
        except BadRow as bad:
            yield Rejected(number, None, bad.reason, bad.excerpt)


def _plain(text: object) -> Conversation:
    if not isinstance(text, str):
        raise BadRow("text is not text", excerpt(text))
    if not text.strip():
        raise BadRow("text is empty", "")
    if len(text) > MAX_CHARS:
        raise BadRow(f"a text is longer than {MAX_CHARS:,} characters", excerpt(text))
    id = hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]
    return Conversation(id, [{"role": "user", "content": text}])


class InstanceReader:
    """Reads slices as instances, without repeats and held-out rows; remembers what it could not."""

    def __init__(
        self,
        tokenizer: ChatTokenizer,
        *,
        plain_text: bool = False,
        is_held_out: Callable[[str], bool] | None = None,
        repeats: frozenset[int] = frozenset(),
        max_rejected: float = 0.1,
    ) -> None:
        """Say what is read.

        Args:
            tokenizer: of the model.
            plain_text: read without the template.
            is_held_out: says of an id whether its row is kept from training.
            repeats: numbers of rows that are left out, by `sae_ray.sae.repeats`.
            max_rejected: share of rows that may be unreadable.
        """
        self.tokenizer, self.plain_text = tokenizer, plain_text
        self.is_held_out = is_held_out or (lambda _: False)
        self.repeats, self.max_rejected = repeats, max_rejected
        self.rejected: dict[int, Rejected] = {}
        self.rows_in: dict[int, int] = {}
        """Rows of each slice that was read."""
        self._cached: dict[int, list[Lanes]] = {}
        self._num_cached = 0

    def shards(self, slices: Sequence[Slice]) -> list[Shard]:
        """Return slices as shards of a stream."""
        return [functools.partial(self.read, part) for part in slices]

    def read(self, part: Slice) -> list[Lanes]:
        """Return a slice's instances to train on.

        Raises:
            PoolError: too many rows so far could not be read.
        """
        if part.index not in self._cached:
            instances = self._read(part, held_out=False)
            num_tokens = sum(map(len, instances))
            if self._num_cached + num_tokens > _CACHED_TOKENS:
                return instances
            self._num_cached += num_tokens
            self._cached[part.index] = instances
        return self._cached[part.index]

    def held_out(self, slices: Sequence[Slice], num_rows: int) -> list[Lanes]:
        """Return held-out instances from all over some slices, about so many."""
        instances: list[Lanes] = []
        for part in _from_all_over(slices):
            if len(instances) >= num_rows:
                break
            instances += self._read(part, held_out=True)
        return instances[:num_rows]

    def held_out_prompts(self, slices: Sequence[Slice], num_rows: int) -> list[list[Message]]:
        """Return what held-out conversations say before the first answer, of about so many."""
        prompts: list[list[Message]] = []
        for part in _from_all_over(slices) if num_rows else ():
            for row in read_texts(part, plain_text=self.plain_text):
                if len(prompts) >= num_rows:
                    return prompts
                if isinstance(row, Rejected) or row.number in self.repeats:
                    continue
                if not self.is_held_out(row.conversation.id):
                    continue
                said = row.conversation.messages
                prompt = list(itertools.takewhile(lambda one: one["role"] != "assistant", said))
                if len(prompt) < len(said) and prompt and prompt[-1]["role"] == "user":
                    prompts.append(prompt)
        return prompts

    def state_dict(self) -> dict[str, Any]:
        """Return what was read and what could not be, in plain values."""
        rejected = [list(dataclasses.astuple(one)) for one in self.rejected.values()]
        return {"rejected": rejected, "rows_in": self.rows_in}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take in what another reader has counted."""
        self.rejected |= {one.row: one for one in (Rejected(*x) for x in state["rejected"])}
        self.rows_in |= state["rows_in"]

    def _read(self, part: Slice, *, held_out: bool) -> list[Lanes]:
        rows: list[Row] = []
        for row in read_texts(part, plain_text=self.plain_text):
            if isinstance(row, Rejected):
                self.rejected[row.row] = row
            elif (
                row.number not in self.repeats and self.is_held_out(row.conversation.id) == held_out
            ):
                rows.append(row)
        instances = self._tokenized(rows)
        self.rows_in[part.index] = part.num_rows
        self._stop_if_too_bad()
        return instances

    def _tokenized(self, rows: Sequence[Row]) -> list[Lanes]:
        if self.plain_text:
            texts = [row.turns[0] if row.is_text else row.conversation.text() for row in rows]
            instances, unreadable = text_instances(self.tokenizer.tokenizer, texts), []
        else:
            conversations = [row.conversation for row in rows]
            instances, unreadable = chat_instances(self.tokenizer, conversations)
        instances = [one for one in instances if len(one)]
        places = [int(one[0, CONVERSATION]) for one in instances]
        for place, one in zip(places, instances, strict=True):
            one[:, CONVERSATION] = rows[place].number
        if unreadable:
            missing = sorted(set(range(len(rows))) - set(places))
            for place, (id, why) in zip(missing, unreadable, strict=True):
                number = rows[place].number
                self.rejected[number] = Rejected(number, id, why.reason, "")
        return instances

    def _stop_if_too_bad(self) -> None:
        num_rows = sum(self.rows_in.values())
        if num_rows >= _JUDGED_ROWS and len(self.rejected) > self.max_rejected * num_rows:
            counts = count_reasons(self.rejected.values())
            reasons = "; ".join(f"{reason}: {count}" for reason, count in counts.items())
            raise PoolError(
                f"{len(self.rejected)} of the first {num_rows} rows cannot be read ({reasons}): at "
                f"most {self.max_rejected:.0%} may be; mend the data, or raise max_rejected"
            )


def _from_all_over(slices: Sequence[Slice]) -> Iterator[Slice]:
    """Yield slices in a fixed random order: a pool is often one source behind the other."""
    yield from (slices[i] for i in np.random.default_rng(0).permutation(len(slices)))
