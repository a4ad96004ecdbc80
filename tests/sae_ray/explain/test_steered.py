"""Special tokens' latents, pushed: which, how far, and beside which controls."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from sae_ray.chat import ChatTokenizer, Conversation, Message
from sae_ray.explain.steered import STRENGTHS, SpecialSteering
from sae_ray.lm import LanguageModel
from sae_ray.sae.encoder import LatentEncoder
from sae_ray.sae.quality import Quality, measure_saes
from sae_ray.sae.sequences import chat_instances
from sae_ray.sae.splice import WholeModel
from sae_ray.sae.steer import special_latents

PROMPTS: list[list[Message]] = [
    [{"role": "user", "content": "Write a query that counts"}],
    [{"role": "user", "content": "orders of each customer"}],
]


@pytest.fixture
def pushing(tiny_lm: Path, tiny_sae: Path) -> tuple[SpecialSteering, LatentEncoder, Quality]:
    encoder, tokenizer = LatentEncoder.load(tiny_sae), ChatTokenizer.load(tiny_lm)
    reader = LanguageModel.load(tiny_lm, [encoder.hook_point])
    asked = [Conversation(str(i), one) for i, one in enumerate(PROMPTS)]
    instances, _ = chat_instances(tokenizer, asked)
    quality = measure_saes(reader, {"it": encoder}, instances)["it"]
    whole = WholeModel.load(tiny_lm)
    return SpecialSteering(reader, whole, tokenizer, instances, PROMPTS), encoder, quality


def test_the_strongest_special_latents_are_pushed_beside_their_controls(pushing) -> None:
    steered, encoder, quality = pushing
    special = special_latents(steered.reader, encoder, steered.instances)
    best = max(special, key=lambda one: one.mean_max)
    first, *others = steered(encoder, quality, {best.latent: "who speaks"})
    assert (first.latent, first.label) == (best.latent, "who speaks")
    assert first.token == steered.tokenizer.tokenizer.decode([best.token])
    assert len(others) <= 1
    assert all(one.latent != first.latent for one in others)
    tried = [(one.arm, one.strength and round(one.strength, 6)) for one in first.effects]
    arms = ("the latent", "its opposite", "a random direction", "another latent")
    assert tried == [
        ("read through the SAE", None), *((arm, one) for one in STRENGTHS for arm in arms)
    ]  # fmt: skip
    assert all(one.kl > 0 and 0 <= one.agreement <= 1 for one in first.effects)
    assert first.question == PROMPTS[0][0]["content"]
    assert [what for what, _ in first.answers][0] == "left alone"
    assert len(first.answers) == 1 + 2 * len(STRENGTHS)


def test_strength_is_in_lengths_of_the_stream(pushing) -> None:
    steered, encoder, quality = pushing
    twice = dataclasses.replace(
        quality,
        parts={
            name: dataclasses.replace(one, mean_norm=2 * one.mean_norm)
            for name, one in quality.parts.items()
        },
    )
    one, other = steered(encoder, quality, {})[0], steered(encoder, twice, {})[0]
    # Half of a stream twice as long is all of this one.
    for arm in ("the latent", "a random direction"):
        whole = next(e.kl for e in one.effects if (e.arm, e.strength) == (arm, 1.0))
        half = next(e.kl for e in other.effects if e.arm == arm and np.isclose(e.strength, 0.5))
        assert whole == pytest.approx(half, rel=1e-4)


def test_without_questions_or_a_head_nothing_is_pushed(pushing) -> None:
    steered, encoder, quality = pushing
    assert dataclasses.replace(steered, prompts=[])(encoder, quality, {}) == []
    assert dataclasses.replace(steered, whole=None)(encoder, quality, {}) == []


def test_prompts_that_cannot_be_asked_are_left_out(pushing, caplog) -> None:
    steered, encoder, quality = pushing
    # The template refuses an empty conversation, and the model has 512 positions.
    long: list[Message] = [{"role": "user", "content": "orders of each customer " * 200}]
    more = dataclasses.replace(steered, prompts=[[], long, *PROMPTS])
    assert more(encoder, quality, {}) == steered(encoder, quality, {})
    assert "2 prompts are too long" in caplog.text
    assert dataclasses.replace(steered, prompts=[[], long])(encoder, quality, {}) == []


def test_a_latent_without_controls_leaves_the_rest_of_the_page(pushing, caplog) -> None:
    steered, encoder, quality = pushing
    narrow = dataclasses.replace(encoder, W_dec=torch.ones_like(encoder.W_dec))
    assert steered(narrow, quality, {}) == []
    assert "is not pushed: latent" in caplog.text
