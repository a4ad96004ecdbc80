"""Row forms a pool may hold: each row becomes a conversation, or a rejection that says why.

    messages                    list of {role, content}
    conversations               list of {from, value}, as ShareGPT writes it
    prompt, completion          text, or lists of messages
    prompt, response            the same
    instruction, input, output  text; `input` may be absent or empty
    prompt, chosen, rejected    a preference pair (see `pairs`), of which the chosen reply is read
    chosen, rejected            the same, as whole conversations or hh-rlhf's transcripts
    plain_text                  moss-002: turns marked [Human]: ... <eoh> [MOSS]: ... <eoa>

The first form whose columns are all there is read; other columns are left alone. A row without
an id gets one from its content, so that the same conversation has the same id in every form and
file type.

This module knows neither files nor models.
"""

import dataclasses
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping

from sae_ray.chat import Conversation, Message

ROLES = ("system", "user", "assistant", "tool", "developer")
"""Roles that are read; ShareGPT's names for them are translated."""

FORMS: tuple[tuple[str, ...], ...] = (
    ("messages",),
    ("conversations",),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "output"),
    ("prompt", "chosen", "rejected"),
    ("chosen", "rejected"),
    ("plain_text",),
)
"""Columns of each form, in the order in which they are looked for."""

PLAIN_FORMS = (*FORMS, ("text",))
"""The same, and plain text, where that will do."""

MAX_CHARS = 1_000_000
"""Longest turn that is read, in characters."""

_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
_SPOKEN = ("user", "assistant")
_EXCERPT_CHARS = 200
_MAX_ID_CHARS = 512
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


class BadRow(Exception):
    """Why one row cannot be read: a fixed reason to count by, and the place it stands."""

    def __init__(self, reason: str, excerpt: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.excerpt = excerpt


@dataclasses.dataclass(frozen=True, slots=True)
class Rejected:
    """One row that was not read."""

    row: int
    """Its number in the pool."""
    id: str | None
    reason: str
    """One of a few fixed phrases."""
    excerpt: str
    """The offending place, at most 200 printable characters."""


def count_reasons(rejected: Iterable[Rejected]) -> dict[str, int]:
    """Count rejected rows by reason, most frequent first."""
    return dict(Counter(row.reason for row in rejected).most_common())


Forms = tuple[tuple[str, ...], ...]


def find_form(columns: Collection[str], forms: Forms = FORMS) -> tuple[str, ...] | None:
    """Return the columns of the first form that is all there."""
    return next((form for form in forms if all(name in columns for name in form)), None)


def forms_text(forms: Forms = FORMS) -> str:
    """Name forms in one line."""
    return "; ".join(map(", ".join, forms))


def to_conversation(row: Mapping[str, object], *, max_chars: int = MAX_CHARS) -> Conversation:
    """Read one row in any of the forms.

    Raises:
        BadRow: the row holds no conversation that can be learnt from.
    """
    form = find_form(row)
    if form is None:
        raise BadRow(f"no known columns (read are: {forms_text()})", excerpt(", ".join(row)))
    if form == ("instruction", "output"):
        messages = _from_instruction(row)
    elif "chosen" in form:
        messages = chosen_messages(row)
    elif form == ("plain_text",):
        messages = _from_marked(_text("plain_text", row["plain_text"]))
    elif len(form) == 1:
        messages = _from_list(form[0], row[form[0]])
    else:
        roles = zip(form, _SPOKEN, strict=True)
        messages = [message for name, role in roles for message in _turns(name, row[name], role)]
    require_readable(messages, max_chars)
    return Conversation(id=read_id(row, messages), messages=messages)


def chosen_messages(row: Mapping[str, object]) -> list[Message]:
    """Return the whole conversation that ends with a pair's chosen reply."""
    chosen = row["chosen"]
    if "prompt" not in row:
        if isinstance(chosen, str):
            return _from_transcript(chosen)
        return _from_list("chosen", chosen)
    turns = _turns("chosen", chosen, "assistant")
    if turns[0]["role"] != "assistant":
        return turns  # UltraFeedback: the prompt is there twice
    return [*_turns("prompt", row["prompt"], "user"), *turns]


def read_id(row: Mapping[str, object], messages: list[Message]) -> str:
    """Return a row's id, or one from its content where it has none."""
    given = _read_id(row.get("id"))
    return content_id(messages) if given is None else given


def content_id(messages: list[Message]) -> str:
    """Return a stable id: the first 16 hex digits of the SHA-256 of the turns."""
    turns = [[message["role"], message["content"]] for message in messages]
    text = json.dumps(turns, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def excerpt(value: object) -> str:
    """Return the beginning of any value as text that can be printed and stored."""
    try:
        text = str(value)[:_EXCERPT_CHARS]
    except RecursionError:
        text = f"a deeply nested {type(value).__name__}"
    return _UNPRINTABLE.sub(lambda bad: repr(bad[0])[1:-1], text)[:_EXCERPT_CHARS]


def _found(place: str, value: object) -> str:
    return excerpt(f"{place}: {excerpt(value)}")


def _from_instruction(row: Mapping[str, object]) -> list[Message]:
    """Join instruction and input to the user's turn."""
    parts = [_text("instruction", row["instruction"])]
    if row.get("input") is not None:
        parts.append(_text("input", row["input"]))
    asked = "\n\n".join(part for part in parts if part.strip())
    answered = _text("output", row["output"])
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]


def _from_transcript(text: str) -> list[Message]:
    """Read turns that begin with a blank line and Human: or Assistant:, as hh-rlhf writes them."""
    return _from_marks(re.split(r"(?:\A|\n)\s*\n(Human|Assistant):", text), text)


def _from_marked(text: str) -> list[Message]:
    """Read turns that begin with [Human]: or [MOSS]: and end with <eoh> or <eoa>."""
    return _from_marks(re.split(r"\[(Human|MOSS)\]:", re.sub(r"<eo[ah]>", "", text)), text)


def _from_marks(parts: list[str], text: str) -> list[Message]:
    before, marks, contents = parts[0], parts[1::2], parts[2::2]
    if not marks:
        raise BadRow("no marks of who speaks in the text", excerpt(text))
    system: list[Message] = (
        [{"role": "system", "content": before.strip()}] if before.strip() else []
    )
    turns: list[Message] = [
        {"role": "user" if mark == "Human" else "assistant", "content": content.strip()}
        for mark, content in zip(marks, contents, strict=True)
    ]
    return system + turns


def _turns(name: str, value: object, role: str) -> list[Message]:
    """Read a column that is one turn of text or a list of messages."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return _from_list(name, value)


def _from_list(name: str, value: object) -> list[Message]:
    if value is None or value == []:
        raise BadRow("no messages", f"{name} is empty")
    if not isinstance(value, list):
        raise BadRow("messages are not a list", _found(name, value))
    return [_message(f"{name}[{index}]", item) for index, item in enumerate(value)]


def _message(place: str, item: object) -> Message:
    if not isinstance(item, dict):
        raise BadRow("a message is not an object with role and content", _found(place, item))
    role = item["role"] if "role" in item else item.get("from")
    if isinstance(role, str):
        role = _SHAREGPT_ROLES.get(role, role)
    if not isinstance(role, str) or role not in ROLES:
        reason = f"unknown role (allowed: {', '.join(ROLES)})"
        raise BadRow(reason, _found(f"{place}.role", role))
    if item.get("tool_calls"):
        # Reading the text beside them would teach an answer that nobody gave.
        raise BadRow("tool calls cannot be read", _found(place, item["tool_calls"]))
    content = item["content"] if "content" in item else item.get("value")
    return {"role": role, "content": _text(f"{place}.content", content)}


def _text(place: str, value: object) -> str:
    if not isinstance(value, str):
        raise BadRow("content is not text", _found(place, value))
    return value


def require_readable(messages: list[Message], max_chars: int = MAX_CHARS) -> None:
    """Refuse conversations that a model cannot read or learn from."""
    for index, message in enumerate(messages):
        place, content = f"turn {index} ({message['role']})", message["content"]
        if len(content) > max_chars:
            what = f"{place}: {len(content):,} characters, {content[:80]}"
            raise BadRow(f"a turn is longer than {max_chars:,} characters", excerpt(what))
        _check_characters(place, content)
        if message["role"] in _SPOKEN and not content.strip():
            raise BadRow(f"empty {message['role']} turn", place)
    if not any(message["role"] == "assistant" for message in messages):
        roles = ", ".join(message["role"] for message in messages)
        raise BadRow("no assistant turn to learn from", _found("roles", roles))


def _check_characters(place: str, text: str) -> None:
    if "\x00" in text:
        raise BadRow("NUL character in the text", _found(place, _around(text, "\x00")))
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = _around(text, text[error.start])
        raise BadRow("lone surrogate in the text", _found(place, found)) from error


def _around(text: str, character: str) -> str:
    at = text.index(character)
    return text[max(0, at - 40) : at + 40]


def _read_id(value: object) -> str | None:
    """Return the id as text, or None where the row has none."""
    if isinstance(value, float):  # pandas: whole numbers become these where one is missing
        value = None if math.isnan(value) else int(value) if value.is_integer() else value
    if value is None or value == "":
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise BadRow("id is neither text nor a whole number", _found("id", value))
    text = str(value)
    if len(text) > _MAX_ID_CHARS:
        raise BadRow(f"id is longer than {_MAX_ID_CHARS} characters", _found("id", text))
    _check_characters("id", text)
    return text
