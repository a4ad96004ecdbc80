"""Gains: at which tokens of a reply an adapter makes it likelier, and what is answered with it."""

import contextlib
from collections.abc import Iterator

import torch
from jaxtyping import Float
from markupsafe import Markup
from peft import PeftModel
from torch import Tensor

from sae_ray.adapters.examples import Example
from sae_ray.adapters.replies import labels_of, padded
from sae_ray.chat import ChatTokenizer
from sae_ray.explain.shading import ShadedText, to_html

_NEW_TOKENS = 64
_SHOWN_FROM = 0.1
"""Nats below which a token is left unshaded."""
_FULL = 3.0
"""Nats of the strongest shade."""
_LIKELIER, _UNLIKELIER = 0, 1


@torch.no_grad()
def gained(model: PeftModel, row: Example, tokenizer: ChatTokenizer) -> Markup:
    """Return a row's reply with its tokens shaded by the nats that the adapter gains at each."""
    with _as(model, tuned=False):
        before = _log_probs(model, row)
    after = _log_probs(model, row)
    pieces = [
        _piece(str(tokenizer.tokenizer.decode([int(row.ids[at])])), float(after[at] - before[at]))
        for at in range(1, len(row.ids))
        if row.learnt[at]
    ]
    said = {_LIKELIER: "nats gained", _UNLIKELIER: "nats lost"}
    return to_html(pieces, lambda which: said[which], lambda which: f"l{which}")


@torch.no_grad()
def greedy(model: PeftModel, row: Example, tokenizer: ChatTokenizer, *, tuned: bool) -> str:
    """Return the likeliest answer to a row's prompt, with the adapter or without."""
    prompt = torch.from_numpy(row.ids[: int(row.learnt.argmax())]).long()[None]
    prompt = prompt.to(next(model.parameters()).device)
    with _as(model, tuned=tuned):
        ids = model.generate(  # pyright: ignore[reportCallIssue]
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=_NEW_TOKENS,
            pad_token_id=tokenizer.tokenizer.pad_token_id or 0,
        )
    said = tokenizer.tokenizer.decode(ids[0, prompt.shape[1] :], skip_special_tokens=True)
    return str(said)


@contextlib.contextmanager
def _as(model: PeftModel, *, tuned: bool) -> Iterator[None]:
    with contextlib.nullcontext() if tuned else model.disable_adapter():
        yield


def _log_probs(model: PeftModel, row: Example) -> Float[Tensor, " tokens"]:
    """Return the log probability of each token but the first, which has 0."""
    device = next(model.parameters()).device
    ids, real, learnt = (one.to(device) for one in padded([row], 0))
    labels = labels_of(ids, learnt)
    inputs = {"input_ids": ids, "attention_mask": real.long(), "labels": labels}
    logits = model(**inputs, use_cache=False).logits[0, :-1].float()
    found = logits.log_softmax(-1).gather(-1, ids[0, 1:, None]).squeeze(-1)
    return torch.cat([found.new_zeros(1), found]).cpu()


def _piece(text: str, gain: float) -> ShadedText:
    if abs(gain) < _SHOWN_FROM:
        return ShadedText(text)
    which = _LIKELIER if gain > 0 else _UNLIKELIER
    return ShadedText(text, which, abs(gain), min(1.0, abs(gain) / _FULL))
