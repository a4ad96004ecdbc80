"""Sampling: logits to tokens, row by row, and tokens to text that may be shown already."""

import random
from collections.abc import Sequence

import torch
from jaxtyping import Float
from tokenizers import Tokenizer
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
    device = logits.device
    # In double precision, and less their maximum: no temperature is too near 0.
    scaled = logits[drawn].double()
    scaled = (scaled - scaled.amax(-1, keepdim=True)) / _column(
        [samplings[i].temperature for i in drawn], device
    )
    at = _column([draws[i].random() for i in drawn], device)
    likely = scaled.softmax(-1)
    nucleus = [k for k, i in enumerate(drawn) if samplings[i].top_p < 1]
    if nucleus:
        top_p = _column([samplings[drawn[k]].top_p for k in nucleus], device)
        likely[nucleus] = _nucleus(likely[nucleus], top_p)
    cumulative = likely.cumsum(-1)
    # Right of all that is less: a token without probability is never chosen, not even at 0.
    where = torch.searchsorted(cumulative, at * cumulative[:, -1:], right=True).squeeze(1)
    for i, token in zip(drawn, where.tolist(), strict=True):
        chosen[i] = min(token, logits.shape[-1] - 1)
    return chosen


def _column(values: Sequence[float], device: torch.device) -> Float[Tensor, "rows 1"]:
    return torch.tensor(values, dtype=torch.float64, device=device).unsqueeze(1)


def _nucleus(
    likely: Float[Tensor, "rows vocab"], top_p: Float[Tensor, "rows 1"]
) -> Float[Tensor, "rows vocab"]:
    """Return the probabilities of the likeliest tokens that together have `top_p`; 0 elsewhere."""
    likeliest, order = likely.sort(-1, descending=True)
    before = likeliest.cumsum(-1) - likeliest
    before[:, 0] = -1  # the likeliest one always is
    return torch.zeros_like(likely).scatter(-1, order, likeliest.where(before < top_p, 0))


def _decode(tokenizer: Tokenizer, id: int) -> str:
    return tokenizer.decode([id], skip_special_tokens=False)


class TextStream:
    """The text of an answer as it grows, up to the first stop string.

    What may turn out to be the beginning of a stop string, and half a character, is kept back.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._ids: list[int] = []
        self._from = self._to = 0
        """The last tokens that became text: the next ones are decoded behind them."""
        self._decoded = ""
        self._shown = 0
        self._grown = (0, 0)
        """Lengths before and after the last token."""
        self._untold: list[Token] = []
        self._ended = False
        self.stopped = False
        """Whether a stop string was met."""

    def add(self, id: int) -> str:
        """Take the next token; return the text that can be shown from now on."""
        self._ids.append(id)
        before = len(self._decoded)
        self._decoded += self._new_text()
        self._grown = before, len(self._decoded)
        found = [at for one in self._stop if (at := self._decoded.find(one, self._shown)) >= 0]
        if found:
            self.stopped = True
            self._decoded = self._decoded[: min(found)]
            return self._show(len(self._decoded))
        return self._show(len(self._decoded) - self._kept_back())

    def _new_text(self, *, last: bool = False) -> str:
        """Return what the last tokens add: nothing while they may be half a character.

        Not tokenizers' DecodeStream, which raises where bytes follow each other that are no text.
        """
        before = self._tokenizer.decode(self._ids[self._from : self._to], skip_special_tokens=True)
        text = self._tokenizer.decode(self._ids[self._from :], skip_special_tokens=True)
        if not last and (len(text) <= len(before) or text.endswith("\ufffd")):
            return ""
        self._from, self._to = self._to, len(self._ids)
        return text[len(before) :]

    def note(self, logits: Float[Tensor, " vocab"], top: int) -> None:
        """Keep the last token's probability at its place, and the `top` likeliest tokens there."""
        logprobs = logits.float().log_softmax(-1)
        values, ids = logprobs.topk(min(top, len(logprobs)))
        text = _decode(self._tokenizer, self._ids[-1])
        # The text may have grown by what was half a character before, too: that comes first.
        offset = max(self._grown[0], self._grown[1] - len(text))
        pairs = zip(ids.tolist(), values.tolist(), strict=True)
        likeliest = tuple((_decode(self._tokenizer, id), value) for id, value in pairs)
        self._untold.append(Token(text, float(logprobs[self._ids[-1]]), offset, likeliest))

    def due(self) -> tuple[Token, ...]:
        """Return the noted tokens whose text is shown by now; what a stop string cuts never is."""
        begun = [one for one in self._untold if one.offset < self._shown]
        due = self._untold if self._ended and not self.stopped else begun
        self._untold = self._untold[len(due) :]
        return tuple(due)

    def end(self) -> str:
        """Return what was kept back: there is no more to come."""
        self._ended = True
        if not self.stopped:
            self._decoded += self._new_text(last=True)
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
