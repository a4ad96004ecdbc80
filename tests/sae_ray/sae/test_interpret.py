"""Statistics without a judge: those of latents that are planted come out as planted."""

from pathlib import Path

import pytest
import torch

from sae_ray.chat import ChatTokenizer, Kind
from sae_ray.lm import HookPoint, LanguageModel
from sae_ray.sae.encoder import LatentEncoder
from sae_ray.sae.interpret import Reading, entropy_bits
from sae_ray.sae.lens import LogitLens
from sae_ray.sae.splice import WholeModel

POINT = HookPoint(0, "resid_pre")
"""Where the stream is the token's embedding and nothing else: latents can be planted there."""


def embedding(lm: Path, token: int) -> torch.Tensor:
    weights = WholeModel.load(lm).model.get_input_embeddings()
    return weights(torch.tensor([token]))[0].detach()  # pyright: ignore


def planted(lm: Path, tokenizer: ChatTokenizer, words: list[str]) -> LatentEncoder:
    """Latent i is on at the token of word i and at no other; the last is never on."""
    ids = [tokenizer.tokenizer.convert_tokens_to_ids(word) for word in words]
    rows = torch.stack([embedding(lm, id) for id in ids])  # pyright: ignore
    W = torch.cat([rows / rows.norm(dim=-1, keepdim=True) ** 2, torch.zeros(1, 32)])
    return LatentEncoder(
        W=W.T.contiguous(),
        b=torch.zeros(len(W)),
        theta=torch.full((len(W),), 0.98),
        k=None,
        input_norm="none",
        W_dec=torch.cat([rows, rows[:1]]),
        b_dec=torch.zeros(32),
        hook_point=POINT,
        model_name="tiny",
    )


@pytest.fixture
def reading(tiny_lm: Path) -> Reading:
    tokenizer = ChatTokenizer.load(tiny_lm)
    encoder = planted(tiny_lm, tokenizer, ["<|im_start|>", "user", "Ġquery"])
    one = Reading(LanguageModel.load(tiny_lm, [POINT]), encoder, tokenizer, max_tokens=60)
    rows = [
        {
            "id": f"{number}",
            "messages": [
                {"role": "user", "content": "Write a query that counts" if number % 2 else "Write"},
                {"role": "assistant", "content": "orders of each customer " * (number % 3)},
            ],
        }
        for number in range(80)
    ]
    assert one.add(rows[:50], lambda id: int(id) % 4 < 2) == []
    assert one.add(rows[50:], lambda id: int(id) % 4 < 2) == []
    return one


def test_planted_latents_are_described_as_planted(reading: Reading, tiny_lm: Path) -> None:
    start, user, query, never = reading.facts(LogitLens.load(tiny_lm, POINT))
    assert start.density == pytest.approx(160 / reading.num_tokens)
    assert user.density == pytest.approx(80 / reading.num_tokens)
    assert query.density == pytest.approx(40 / reading.num_tokens)
    assert (start.template_share, user.template_share, query.template_share) == (1, 1, 0)
    assert query.peak_tokens == [" query"]
    assert query.token_entropy_bits == 0
    assert query.max_activation == pytest.approx(1, abs=1e-4)
    assert never.density == never.max_activation == 0
    assert never.peak_tokens == []
    # Its decoder row is that of the first.
    assert (never.neighbours[0], never.neighbour_cosines[0]) == (0, 1.0)
    assert len(query.promoted) == len(query.suppressed) == 10


def test_labels_come_from_what_was_said_and_from_the_template(reading: Reading) -> None:
    labels = [label.label for label in reading.labels()]
    assert labels == ['token "<|im_start|>"', 'token "user"', 'token "query"', "unlabelled"]


def test_what_a_template_refuses_and_what_is_long_is_counted(tiny_lm: Path) -> None:
    tokenizer = ChatTokenizer.load(tiny_lm)
    encoder = planted(tiny_lm, tokenizer, ["user"])
    reading = Reading(LanguageModel.load(tiny_lm, [POINT]), encoder, tokenizer, max_tokens=16)
    long = [{"role": "user", "content": "query " * 50}]
    rows = [{"id": "empty", "messages": []}, {"id": "long", "messages": long}]
    ((id, reason),) = reading.add(rows, lambda _: False)
    assert (id, reason) == ("empty", "chat template: there are no turns")
    assert (reading.num_tokens, reading.num_truncated) == (16, 1)
    assert reading.contexts.num_tokens[Kind.CONTENT] > 0
    # Nothing is held out: nothing can be checked.
    assert [label.kind for label in reading.labels()] == ["unlabelled"] * 2


def test_entropy_counts_how_often_each_stands_there() -> None:
    assert entropy_bits(["a"] * 8) == entropy_bits([]) == 0
    assert entropy_bits(["a", "b"]) == 1
    assert entropy_bits(["a", "a", "b", "c"]) == 1.5
