"""Checking answers, and asking in batches."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sae_ray import tiny
from sae_ray.tiny.exam import is_correct, replies


@pytest.mark.parametrize(
    ("reply", "answer", "metric", "right"),
    [
        ("4 + 7 = 11. The answer is 11.", "11", "number", True),
        ("4 + 7 = 11. The answer is 12.", "11", "number", False),
        ("no idea", "11", "number", False),
        ("Tools.", "tools", "choice", True),
        ("toys", "tools", "choice", False),
        ("tools toys", "tools", "choice", False),
        (" keru tal nenar ", "keru tal nenar", "exact", True),
        ("keru nenar tal", "keru tal nenar", "exact", False),
    ],
)
def test_replies_are_checked_by_their_metric(
    reply: str, answer: str, metric: str, right: bool
) -> None:
    assert is_correct(reply, answer, metric) == right


def test_a_question_is_answered_alike_alone_and_in_a_batch() -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny.lm_path(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny.lm_path())
    contents = ["Hello, I am Nora.", 'Repeat: "It is Monday and the mill is busy."', "Thank you."]
    chats = [[{"role": "user", "content": content}] for content in contents]
    together = list(replies(model, tokenizer, chats, max_new_tokens=8))
    alone = list(replies(model, tokenizer, chats, max_new_tokens=8, batch_size=1))
    assert together == alone
