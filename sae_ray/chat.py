"""Conversations to token ids, with a mark on every token: content, template or role word.

A chat template wraps each message in special tokens and role words. Curation must not read
those, SAE training must, and every metric can be split by them, so each token carries its kind.
Where a message begins and ends is found from the template itself (rendered once a pattern of
roles with markers in place of the contents), never from a list of token ids.

This module knows neither models nor SAEs.
"""

import dataclasses
import enum
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict, cast

import numpy as np
from jaxtyping import Bool, Int32, Int64, UInt8
from jinja2 import TemplateError
from tokenizers import Encoding, Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from sae_ray.errors import ModelError
from sae_ray.hub import hub_arguments

PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
"""For base models, whose tokenizers have no chat template."""

TEMPLATE_DATE = "26 Jul 2024"
"""The day that a template which asks for `date_string` prints: an index must not depend on the day
it was made. Llama 3.1's own default."""

_ROLE_WORD = re.compile(r"[ ▁]?\w+(?=\n|<|\Z)")


_MAX_FRAMES = 64
"""Patterns of roles that are kept: a service is asked with any number of them."""

STANDING_ROLES = ("system", "developer")
"""Who speaks once for a whole conversation."""


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
        """Return what is said, one turn a line: what a lexical method reads.

        Not what a system prompt asks for: that is the same in many rows, and would make them alike.
        """
        said = [m["content"] for m in self.messages if m["role"] not in STANDING_ROLES]
        return "\n".join(said or [m["content"] for m in self.messages])


class Kind(enum.IntEnum):
    """What a token is: something somebody said, or part of the template."""

    CONTENT = 0
    """Holds at least one character of a message."""
    TEMPLATE = 1
    """Separators and text that the template adds by itself."""
    ROLE = 2
    """A word of the template alone behind a special token: `user`, `assistant`, `model`."""
    SPECIAL = 3
    """An added token of the tokenizer that the template writes: `<|im_start|>`."""


@dataclasses.dataclass(frozen=True, slots=True)
class Tokens:
    """One tokenised conversation."""

    ids: Int32[np.ndarray, " tokens"]
    kinds: UInt8[np.ndarray, " tokens"]
    response: Bool[np.ndarray, " tokens"]
    """True on the content of assistant turns; prompt is all other content."""
    ends: Int64[np.ndarray, " tokens"]
    """Where each token ends in the rendered text; the next one begins there."""
    truncated: bool
    """True if tokens past the limit were left out."""

    def __len__(self) -> int:
        return len(self.ids)


@dataclasses.dataclass(frozen=True, slots=True)
class Unreadable:
    """Why a conversation has no tokens."""

    reason: str


@dataclasses.dataclass(frozen=True, slots=True)
class _Frame:
    """What a template writes around the contents of one sequence of roles."""

    order: list[int]
    """The messages as the text has them: some templates move the system prompt."""
    before: list[str]
    """The template's text in front of each of them."""
    after: str


class ChatTokenizer:
    """A Hugging Face tokenizer that tells what people said from what the template adds."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.is_fast:
            raise ModelError(
                f"the tokenizer {type(tokenizer).__name__} has no token offsets: a fast tokenizer "
                "(tokenizer.json) is needed; convert it with transformers' convert_slow_tokenizer"
            )
        self.tokenizer = tokenizer
        self.template = PLAIN_TEMPLATE
        if tokenizer.chat_template is not None:
            self.template = tokenizer.get_chat_template()  # the default, where there are several
        self._is_added = np.zeros(max(tokenizer.get_vocab().values()) + 1, dtype=bool)
        self._is_added[list(tokenizer.added_tokens_decoder)] = True
        self._frames: dict[tuple[bool, tuple[str, ...]], _Frame | None] = {}

    @classmethod
    def load(cls, path: str | Path) -> "ChatTokenizer":
        """Load the tokenizer of a local folder or hub name."""
        try:
            return cls(
                AutoTokenizer.from_pretrained(**hub_arguments(path), trust_remote_code=False)
            )
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
            date_string=TEMPLATE_DATE,
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
        rows: list[tuple[str, list[tuple[int, int, bool]]] | Unreadable] = []
        for conversation in conversations:
            messages = conversation.messages
            try:
                if not messages:
                    raise ValueError("there are no turns")
                text = self.render(messages, generation_prompt=generation_prompt)
                text.encode()  # raises where there is a lone surrogate
                rows.append((text, self._contents(messages, text, generation_prompt)))
            # What templates raise themselves, and what jinja raises where a template is careless.
            except (TemplateError, ValueError, TypeError, LookupError) as error:
                rows.append(Unreadable(f"chat template: {_first_line(error)}"))
        texts = [row[0] for row in rows if not isinstance(row, Unreadable)]
        backend = cast(Tokenizer, self.tokenizer.backend_tokenizer)  # pyright: ignore
        encodings = iter(backend.encode_batch(texts, add_special_tokens=False) if texts else ())
        return [
            row if isinstance(row, Unreadable) else self._mark(next(encodings), *row, max_tokens)
            for row in rows
        ]

    def texts(self, conversation: Conversation, tokens: Tokens) -> list[str]:
        """Return each token's part of the rendered text; joined, they are that text again.

        Where several tokens make up one character, the first has it and the others are empty.
        """
        text = self.render(conversation.messages)
        return [text[start:end] for start, end in itertools.pairwise([0, *tokens.ends.tolist()])]

    def _mark(
        self, encoding: Encoding, text: str, contents: list[tuple[int, int, bool]], max_tokens: int
    ) -> Tokens:
        ids = np.array(encoding.ids[:max_tokens], dtype=np.int32)
        offsets = np.array(encoding.offsets[:max_tokens], dtype=np.int64).reshape(-1, 2)
        starts, ends = offsets[:, 0], offsets[:, 1]
        added = self._is_added[ids]
        inside = np.zeros(len(ids), dtype=bool)
        response = np.zeros(len(ids), dtype=bool)
        if contents:
            # The last message that begins before the token's end, and whether it reaches into it:
            # a tokenizer may merge the space before a word, or the full stop and line break after.
            opens, closes, assistant = map(np.array, zip(*contents, strict=True))
            message = np.searchsorted(opens, ends, side="left") - 1
            opens, closes = opens[message], closes[message]
            inside = (message >= 0) & (starts < closes)
            # Added tokens can swallow white space beside them; that makes them nobody's words.
            inside &= ~added | ((starts >= opens) & (ends <= closes))
            response = inside & assistant[message]
        frame = ~inside
        kinds = np.where(added & frame, Kind.SPECIAL, frame).astype(np.uint8)
        for i in np.flatnonzero(added[:-1] & frame[:-1] & frame[1:] & ~added[1:]).tolist():
            if word := _ROLE_WORD.match(text, ends[i]):
                kinds[i + 1 :][(starts[i + 1 :] < word.end()) & frame[i + 1 :]] = Kind.ROLE
        return Tokens(ids, kinds, response, np.maximum.accumulate(ends), len(encoding) > max_tokens)

    def _contents(
        self, messages: Sequence[Message], text: str, generation_prompt: bool
    ) -> list[tuple[int, int, bool]]:
        """Return (start, end, by the assistant) of each content in the text, without empty ones."""
        key = (generation_prompt, tuple(message["role"] for message in messages))
        try:
            frame = self._frames[key]
        except KeyError:
            if len(self._frames) >= _MAX_FRAMES:
                self._frames.clear()
            frame = self._frames[key] = self._frame(*key)
        spans = (frame and _lay(frame, messages, text)) or _search(frame, messages, text)
        return [
            (start, end, messages[i]["role"] == "assistant")
            for i, (start, end) in spans
            if start < end
        ]

    def _frame(self, generation_prompt: bool, roles: tuple[str, ...]) -> _Frame | None:
        """Render markers in place of contents; what stands between them is the template."""
        # U+FDD0.. are permanently unassigned code points: no text holds them by right.
        marked: list[Message] = [
            {"role": role, "content": f"\ufdd0{i}\ufdd1"} for i, role in enumerate(roles)
        ]
        text = self.render(marked, generation_prompt=generation_prompt)
        *parts, after = re.split("\ufdd0(\\d+)\ufdd1", text)
        order = [int(i) for i in parts[1::2]]
        if sorted(order) != list(range(len(roles))):
            return None  # it leaves a turn out, or says it twice
        return _Frame(order, parts[::2], after)


def _lay(
    frame: _Frame, messages: Sequence[Message], text: str
) -> list[tuple[int, tuple[int, int]]] | None:
    """Lay template and contents end to end; None where the text says otherwise."""
    spans: list[tuple[int, tuple[int, int]]] = []
    behind = [*frame.before[1:], frame.after]
    at = len(frame.before[0])
    if not text.startswith(frame.before[0]):
        return None
    for i, piece in zip(frame.order, behind, strict=True):
        content = messages[i]["content"]
        for kept in (content, content.strip(), content.lstrip(), content.rstrip()):
            if text.startswith(kept, at) and text.startswith(piece, at + len(kept)):
                break
        else:
            return None
        spans.append((i, (at, at + len(kept))))
        at += len(kept) + len(piece)
    return spans


def _search(
    frame: _Frame | None, messages: Sequence[Message], text: str
) -> list[tuple[int, tuple[int, int]]]:
    """Find contents one behind the other, for templates whose frame depends on the contents."""
    spans: list[tuple[int, tuple[int, int]]] = []
    at = 0
    order = frame.order if frame else range(len(messages))
    for i, piece in zip(order, frame.before if frame else itertools.repeat(""), strict=False):
        # Past the template's own words, among which a short content might be found.
        at += len(piece) if text.startswith(piece, at) else 0
        content = messages[i]["content"].strip()
        start = text.find(content, at)
        if start < 0:
            raise ValueError(f"it leaves out or rewrites the {messages[i]['role']} turn")
        at = start + len(content)
        spans.append((i, (start, at)))
    return spans


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
