"""Forms: an answer laid out as OpenAI does, whole or in chunks, as a chat's or a completion's."""

import time
import uuid
from collections.abc import Sequence
from typing import Any

from pydantic import JsonValue

from sae_ray.experts.answers import Piece
from serve.gateway import Answer, Chosen


class Form:
    """How an answer is laid out: as a chat's or as a completion's."""

    def __init__(self, model: str, chosen: Chosen, *, chat: bool) -> None:
        self.chat = chat
        self.chosen = chosen
        self._head: dict[str, JsonValue] = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, answer: Answer) -> dict[str, JsonValue]:
        """Lay out a whole answer."""
        choice = self._choice(answer.pieces)
        if self.chat:
            choice["message"] = {"role": "assistant", "content": answer.text, "refusal": None}
        else:
            choice["text"] = answer.text
        return {
            **self._head,
            "object": "chat.completion" if self.chat else "text_completion",
            "choices": [choice],
            "usage": _usage(answer.prompt_tokens, answer.num_tokens),
            "route": self.chosen.told,
        }

    def chunk(self, pieces: Sequence[Piece], *, opening: bool = False) -> dict[str, JsonValue]:
        """Lay out part of an answer; the first one says who answers."""
        choice = self._choice(pieces)
        text = "".join(piece.text for piece in pieces)
        if self.chat:
            choice["delta"] = (
                {"role": "assistant", "content": text} if opening else {"content": text}
            )
        else:
            choice["text"] = text
        told = {"route": self.chosen.told} if opening else {}
        return {**self._head, "object": self._chunk_kind, "choices": [choice], **told}

    def usage_chunk(self, prompt: int, answer: int) -> dict[str, JsonValue]:
        """Lay out what a stream took."""
        usage = _usage(prompt, answer)
        return {**self._head, "object": self._chunk_kind, "choices": [], "usage": usage}

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _choice(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        tokens = [token for piece in pieces for token in piece.tokens]
        logprobs: JsonValue = None
        if tokens and self.chat:
            logprobs = {
                "content": [
                    {
                        **_token(token.text, token.logprob),
                        "top_logprobs": [_token(text, value) for text, value in token.top],
                    }
                    for token in tokens
                ],
                "refusal": None,
            }
        elif tokens:
            logprobs = {
                "tokens": [token.text for token in tokens],
                "token_logprobs": [token.logprob for token in tokens],
                "top_logprobs": [
                    # Of several that read alike (parts of a character) the likeliest.
                    dict(reversed(token.top))
                    for token in tokens
                ],
                "text_offset": [token.offset for token in tokens],
            }
        return {"index": 0, "finish_reason": pieces[-1].finish, "logprobs": logprobs}


def _token(text: str, logprob: float) -> dict[str, JsonValue]:
    # Of a token that holds part of a character its text does not tell the bytes.
    told: JsonValue = None if "\ufffd" in text else [*text.encode("utf-8", "replace")]
    return {"token": text, "logprob": logprob, "bytes": told}


def _usage(prompt: int, answer: int) -> dict[str, JsonValue]:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answer,
        "total_tokens": prompt + answer,
    }
