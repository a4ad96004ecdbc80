"""Sampling: logits to tokens, row by row, and tokens to text that may be shown already."""

import random
from collections.abc import Sequence

import torch
from jaxtyping import Float
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from torch import Tensor

from sae_ray.experts.answers import Sampling, Token


def choose(
    logits: Float[Tensor, "rows vocab"],
    samplings: Sequence[Sampling],
    draws: Sequence[random.Random],
) -> list[int]:
    """Choose a token a row: the likeliest, or one drawn by the row's own generator."""
    chosen: list[int] = logits.argmax(-1).tolist()
    drawn = [i for i, one in enumerate(samplings) if one.temperature > 0]
    if not drawn:
        return chosen
    temperature = torch.tensor([samplings[i].temperature for i in drawn]).unsqueeze(1)
    top_p = torch.tensor([samplings[i].top_p for i in drawn]).unsqueeze(1)
    at = torch.tensor([draws[i].random() for i in drawn]).unsqueeze(1)
    # Divided in double precision: a temperature near 0 must not give 0 x infinity.
    scaled = (logits[drawn].double().cpu() / temperature.double()).softmax(-1)
    likeliest, order = scaled.sort(-1, descending=True)
    before = likeliest.cumsum(-1) - likeliest
    kept = likeliest.where(before < top_p, 0)  # the likeliest one always is
    cumulative = kept.cumsum(-1)
    where = torch.searchsorted(cumulative, at.double() * cumulative[:, -1:], right=True)
    where = where.clamp_max(kept.count_nonzero(-1).unsqueeze(1) - 1)
    for i, token in zip(drawn, order.gather(1, where).squeeze(1).tolist(), strict=True):
        chosen[i] = token
    return chosen


def told(
    logits: Float[Tensor, " vocab"],
    chosen: int,
    grown: tuple[int, int],
    top: int,
    tokenizer: Tokenizer,
) -> Token:
    """Return a chosen token with its logarithmic probability and the likeliest ones beside it.

    Args:
        logits: at its place.
        chosen: the token.
        grown: lengths of the answer's text before and after it, in characters.
        top: how many of the likeliest are told.
        tokenizer: what writes them.
    """
    text = _decode(tokenizer, chosen)
    logprobs = logits.float().log_softmax(-1)
    values, ids = logprobs.topk(min(top, len(logprobs)))
    pairs = zip(ids.tolist(), values.tolist(), strict=True)
    return Token(
        text=text,
        logprob=float(logprobs[chosen]),
        # The text may grow by what was half a character before, too: that comes first.
        offset=max(grown[0], grown[1] - len(text)),
        top=tuple((_decode(tokenizer, id), value) for id, value in pairs),
    )


def _decode(tokenizer: Tokenizer, id: int) -> str:
    return tokenizer.decode([id], skip_special_tokens=False)


class TextStream:
    """The text of an answer as it grows, up to the first stop string.

    What may turn out to be the beginning of a stop string, and half a character, is kept back.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._stop = tuple(stop)
        self._ids: list[int] = []
        self._decoded = ""
        self._shown = 0
        self.stopped = False
        """Whether a stop string was met."""

    @property
    def length(self) -> int:
        """Return how many characters it has, shown or not."""
        return len(self._decoded)

    @property
    def shown(self) -> int:
        """Return how many of them were shown."""
        return self._shown

    def add(self, id: int) -> str:
        """Take the next token; return the text that can be shown from now on."""
        self._ids.append(id)
        self._decoded += self._stream.step(self._tokenizer, id) or ""
        found = [at for one in self._stop if (at := self._decoded.find(one, self._shown)) >= 0]
        if found:
            self.stopped = True
            self._decoded = self._decoded[: min(found)]
            return self._show(len(self._decoded))
        return self._show(len(self._decoded) - self._kept_back())

    def end(self) -> str:
        """Return what was kept back: there is no more to come."""
        if not self.stopped:
            whole = self._tokenizer.decode(self._ids, skip_special_tokens=True)
            # Half a character at the end is shown as decoders show it.
            self._decoded = whole if whole.startswith(self._decoded) else self._decoded
        return self._show(len(self._decoded))

    def _kept_back(self) -> int:
        """Return how many characters at the end may begin a stop string."""
        longest = max(map(len, self._stop), default=1) - 1
        for length in range(min(longest, len(self._decoded) - self._shown), 0, -1):
            if any(one.startswith(self._decoded[-length:]) for one in self._stop):
                return length
        return 0

    def _show(self, end: int) -> str:
        text, self._shown = self._decoded[self._shown : end], max(self._shown, end)
        return text
