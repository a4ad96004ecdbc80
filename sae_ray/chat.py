"""Conversations to token ids, with a mark on every token: content, template or role word.

A chat template wraps each message in special tokens and role words. Curation must not read
those, SAE training must, and every metric can be split by them, so each token carries its kind.
Where a message begins and ends is found from the template itself (rendered once a pattern of
roles with markers in place of the contents), never from a list of token ids.

This module knows neither models nor SAEs.
"""

import dataclasses
import enum
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

import numpy as np
from jaxtyping import Bool, Int32, UInt8
from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from sae_ray.errors import ModelError

PLAIN_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
"""For base models, whose tokenizers have no chat template."""

_WORD = re.compile(r"^\W*\w+\W*$")


class Message(TypedDict):
    """One turn, as Hugging Face chat templates take it."""

    role: str
    content: str


@dataclasses.dataclass(frozen=True, slots=True)
class Conversation:
    """One chat: its id in the pool and its turns."""

    id: str
    messages: list[Message]

    def text(self) -> str:
        """Return the contents alone, one turn a line: what a lexical method reads."""
        return "\n".join(message["content"] for message in self.messages)


class Kind(enum.IntEnum):
    """What a token is: something somebody said, or part of the template."""

    CONTENT = 0
    TEMPLATE = 1
    """Special tokens, separators and text that the template adds by itself."""
    ROLE = 2
    """A word of the template right behind a special token: `user`, `assistant`, `model`."""


@dataclasses.dataclass(frozen=True, slots=True)
class Tokens:
    """One tokenised conversation."""

    ids: Int32[np.ndarray, " tokens"]
    kinds: UInt8[np.ndarray, " tokens"]
    response: Bool[np.ndarray, " tokens"]
    """True on the content of assistant turns; prompt is all other content."""
    truncated: bool
    """True if tokens past the limit were left out."""

    def __len__(self) -> int:
        return len(self.ids)


@dataclasses.dataclass(frozen=True, slots=True)
class Unreadable:
    """Why a conversation has no tokens."""

    reason: str


class ChatTokenizer:
    """A Hugging Face tokenizer that says of each token whether a person or the template wrote it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.is_fast:
            raise ModelError(
                f"the tokenizer {type(tokenizer).__name__} has no token offsets: a fast tokenizer "
                "(tokenizer.json) is needed; convert it with transformers' convert_slow_tokenizer"
            )
        self.tokenizer = tokenizer
        self.template = tokenizer.chat_template or PLAIN_TEMPLATE
        self._special_ids = np.array(sorted(tokenizer.added_tokens_decoder), dtype=np.int64)
        self._pieces: dict[tuple[str, ...], list[str] | None] = {}

    @classmethod
    def load(cls, path: str | Path) -> "ChatTokenizer":
        """Load the tokenizer of a local folder or hub name."""
        try:
            return cls(AutoTokenizer.from_pretrained(str(path), trust_remote_code=False))
        except (OSError, ValueError) as error:
            raise ModelError(
                f"no tokenizer at {path}: {_first_line(error)}; give a folder with tokenizer.json "
                "or the name of a model on the Hugging Face hub"
            ) from error

    def render(self, messages: Sequence[Message], *, generation_prompt: bool = False) -> str:
        """Return the text that the model reads."""
        rendered = self.tokenizer.apply_chat_template(
            list(messages),  # pyright: ignore[reportArgumentType]
            chat_template=self.template,
            tokenize=False,
            add_generation_prompt=generation_prompt,
        )
        assert isinstance(rendered, str)
        return rendered

    def tokenize(
        self,
        conversations: Sequence[Conversation],
        max_tokens: int,
        *,
        generation_prompt: bool = False,
    ) -> list[Tokens | Unreadable]:
        """Tokenise conversations; a row that the template refuses comes back as `Unreadable`."""
        rendered: list[tuple[str, list[tuple[int, int]]] | Unreadable] = []
        for conversation in conversations:
            try:
                text = self.render(conversation.messages, generation_prompt=generation_prompt)
                rendered.append((text, self._content_spans(conversation.messages, text)))
            except (TemplateError, ValueError) as error:
                rendered.append(Unreadable(f"chat template: {_first_line(error)}"))
        texts = [item[0] for item in rendered if not isinstance(item, Unreadable)]
        encodings = iter(
            self.tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)  # pyright: ignore
            if texts
            else ()
        )
        return [
            item
            if isinstance(item, Unreadable)
            else self._mark(next(encodings), item[0], item[1], conversation.messages, max_tokens)
            for item, conversation in zip(rendered, conversations, strict=True)
        ]

    def _mark(
        self,
        encoding: object,
        text: str,
        spans: list[tuple[int, int]],
        messages: Sequence[Message],
        max_tokens: int,
    ) -> Tokens:
        ids = np.asarray(encoding.ids, dtype=np.int32)  # pyright: ignore[reportAttributeAccessIssue]
        offsets = np.asarray(encoding.offsets, dtype=np.int64).reshape(-1, 2)  # pyright: ignore
        starts = offsets[:, 0]
        # A token is content if it starts inside a message; spans are sorted and disjoint.
        bounds = np.asarray(spans, dtype=np.int64).reshape(-1, 2)
        message = np.searchsorted(bounds[:, 0], starts, side="right") - 1
        inside = (message >= 0) & (starts < bounds[np.maximum(message, 0), 1])
        kinds = np.where(inside, Kind.CONTENT, Kind.TEMPLATE).astype(np.uint8)
        kinds[self._role_words(ids, offsets, inside, text)] = Kind.ROLE
        assistant = np.array([m["role"] == "assistant" for m in messages], dtype=bool)
        response = inside & assistant[np.maximum(message, 0)]
        kept = slice(0, max_tokens)
        return Tokens(ids[kept], kinds[kept], response[kept], truncated=len(ids) > max_tokens)

    def _role_words(
        self,
        ids: Int32[np.ndarray, " tokens"],
        offsets: np.ndarray,
        inside: Bool[np.ndarray, " tokens"],
        text: str,
    ) -> list[int]:
        """Find template words that stand right behind a special token."""
        special = np.isin(ids, self._special_ids) & ~inside
        behind = np.flatnonzero(special[:-1] & ~special[1:] & ~inside[1:]) + 1
        return [i for i in behind.tolist() if _WORD.match(text[offsets[i, 0] : offsets[i, 1]])]

    def _content_spans(self, messages: Sequence[Message], text: str) -> list[tuple[int, int]]:
        """Return [start, end) of each message's content in the rendered text."""
        roles = tuple(message["role"] for message in messages)
        if roles not in self._pieces:
            self._pieces[roles] = self._template_pieces(roles)
        pieces = self._pieces[roles]
        for strip in (False, True) if pieces is not None else ():
            contents = [m["content"].strip() if strip else m["content"] for m in messages]
            spans = _interleave(pieces, contents, text)
            if spans is not None:
                return spans
        return _search(messages, text)

    def _template_pieces(self, roles: tuple[str, ...]) -> list[str] | None:
        """Render markers in place of contents; what stands between them is the template."""
        # U+FDD0.. are permanently unassigned code points: no text holds them by right.
        marked: list[Message] = [
            {"role": role, "content": f"\ufdd0{i}\ufdd1"} for i, role in enumerate(roles)
        ]
        pieces: list[str] = []
        rest = self.render(marked)
        for message in marked:
            before, found, rest = rest.partition(message["content"])
            if not found:
                return None
            pieces.append(before)
        return pieces


def _interleave(
    pieces: Sequence[str], contents: Sequence[str], text: str
) -> list[tuple[int, int]] | None:
    """Lay template pieces and contents end to end; None where the text says otherwise."""
    spans: list[tuple[int, int]] = []
    at = 0
    for piece, content in zip(pieces, contents, strict=True):
        start = at + len(piece)
        end = start + len(content)
        if text[at:start] != piece or text[start:end] != content:
            return None
        spans.append((start, end))
        at = end
    return spans


def _search(messages: Sequence[Message], text: str) -> list[tuple[int, int]]:
    """Find contents one behind the other, for templates whose frame depends on the contents."""
    spans: list[tuple[int, int]] = []
    at = 0
    for message in messages:
        content = message["content"].strip()
        start = text.find(content, at)
        if start < 0:
            raise ValueError(f"it rewrites the {message['role']} turn, whose text is not in it")
        at = start + len(content)
        spans.append((start, at))
    return spans


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
