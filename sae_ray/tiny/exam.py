"""Questions with checkable answers, put to a language model: accuracy by domain."""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sae_ray.tiny.tokens import render

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def is_correct(reply: str, answer: str, metric: str) -> bool:
    """Check a reply: `number` by its last number, `choice` by its label, `exact` by its text."""
    match metric:
        case "number":
            numbers = _NUMBER.findall(reply)
            return bool(numbers) and float(numbers[-1]) == float(answer)
        case "choice":
            return reply.strip().rstrip(".").lower() == answer.lower()
        case "exact":
            return reply.strip() == answer
        case _:
            raise AssertionError(f"unknown metric {metric}")


@torch.inference_mode()
def replies(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    chats: Sequence[Sequence[dict[str, str]]],
    *,
    max_new_tokens: int = 24,
    batch_size: int = 60,
) -> Iterator[str]:
    """Yield the model's most likely continuation of chats that end with the user."""
    model.eval()
    for start in range(0, len(chats), batch_size):
        texts = [
            render(tokenizer, chat, generation_prompt=True)
            for chat in chats[start : start + batch_size]
        ]
        batch = tokenizer(
            texts,
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=False,
            return_token_type_ids=False,
        )
        batch = batch.to(model.device)
        ids = model.generate(  # pyright: ignore[reportCallIssue]
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        assert isinstance(ids, torch.Tensor)
        new = ids[:, batch["input_ids"].shape[1] :]
        yield from tokenizer.batch_decode(new, skip_special_tokens=True)


def accuracies(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict[str, Any]]
) -> dict[str, float]:
    """Return the share of right answers by domain; the last turn of a row is the right reply."""
    right: dict[str, list[bool]] = defaultdict(list)
    answers = replies(model, tokenizer, [row["messages"][:-1] for row in rows])
    for row, reply in zip(rows, answers, strict=True):
        right[row["domain"]].append(is_correct(reply, row["answer"], row["metric"]))
    return {domain: sum(hits) / len(hits) for domain, hits in right.items()}
