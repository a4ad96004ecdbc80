"""Prompts: what a request says, as tokens that the model is to go on with."""

import dataclasses
from collections.abc import Sequence

from sae_ray.chat import ChatTokenizer, Conversation, Message, Tokens
from sae_ray.errors import RequestError


@dataclasses.dataclass(frozen=True)
class Prompts:
    """How a model is asked."""

    chat: ChatTokenizer
    context: int
    vocab_size: int

    def of_messages(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Return the tokens of a conversation that the assistant is to go on with.

        Raises:
            RequestError: the model's chat template refuses it.
        """
        conversation = Conversation("", list(messages))
        longest = 4 * self.context + sum(len(one["content"]) for one in messages)
        (tokens,) = self.chat.tokenize([conversation], longest, generation_prompt=True)
        if not isinstance(tokens, Tokens):
            raise RequestError(
                "the model's chat template refuses these messages: let user and assistant take "
                "turns, beginning with the user, after at most one system message",
                param="messages",
            )
        return tuple(tokens.ids.tolist())

    def of_text(self, text: str) -> tuple[int, ...]:
        """Return the tokens of plain text that is to be gone on with."""
        return tuple(self.chat.tokenizer.backend_tokenizer.encode(text).ids)  # pyright: ignore

    def of_tokens(self, ids: Sequence[int]) -> tuple[int, ...]:
        """Return tokens that were given as such.

        Raises:
            RequestError: one of them is none of the model's.
        """
        if not all(0 <= id < self.vocab_size for id in ids):
            raise RequestError(
                f"the prompt holds a token that is none of 0 to {self.vocab_size - 1}: give the "
                "model's own",
                param="prompt",
            )
        return tuple(ids)
