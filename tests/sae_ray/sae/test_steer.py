"""Steering: what is added, where, and that nothing else changes."""

from pathlib import Path

import numpy as np
import pytest
import torch

from sae_ray.chat import ChatTokenizer, Conversation, Kind, Message
from sae_ray.errors import ModelError, TaskError
from sae_ray.lm import HookPoint, LanguageModel
from sae_ray.sae.encoder import LatentEncoder
from sae_ray.sae.sequences import chat_instances
from sae_ray.sae.splice import WholeModel
from sae_ray.sae.steer import ARMS, Steering, agreement, special_latents, steer

PROMPTS: list[list[Message]] = [
    [{"role": "user", "content": "Write a query that counts"}],
    [{"role": "user", "content": "orders of each customer"}],
]
IDS = list(range(5, 17))


@pytest.fixture
def encoder(tiny_sae: Path) -> LatentEncoder:
    return LatentEncoder.load(tiny_sae)


@pytest.fixture
def steering(tiny_lm: Path, encoder: LatentEncoder) -> Steering:
    return Steering(WholeModel.load(tiny_lm), encoder, 7)


def edited(steering: Steering, arm: str, alpha: float, places: list[int]) -> torch.Tensor:
    x = torch.randn(1, 10, 32, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, 10, dtype=torch.bool)
    mask[0, places] = True
    return steering.edit(arm, alpha, mask)(x) - x  # pyright: ignore[reportArgumentType]


def test_an_edit_changes_the_chosen_places_alone(steering: Steering) -> None:
    for arm in ARMS:
        change = edited(steering, arm, 3.0, [2, 7])
        others = [i for i in range(10) if i not in (2, 7)]
        assert not change[0, others].any(), arm
        assert bool(change[0, [2, 7]].any()) == (arm != "none")


def test_directions_are_as_long_as_alpha_and_the_controls_what_they_claim(
    steering: Steering, encoder: LatentEncoder
) -> None:
    latent, flipped, random, unrelated = (
        edited(steering, arm, 3.0, [4])[0, 4]
        for arm in ("latent", "flipped", "random", "unrelated")
    )
    d = encoder.W_dec[7] / encoder.W_dec[7].norm()
    torch.testing.assert_close(latent, 3 * d, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(flipped, -latent, atol=1e-5, rtol=1e-5)
    for control in (random, unrelated):
        assert float(control.norm()) == pytest.approx(3, abs=1e-4)
    assert abs(float(random @ d)) / 3 < 0.7
    assert abs(float(unrelated @ d)) / 3 <= 0.1 + 1e-5
    row = encoder.W_dec[steering.unrelated]
    torch.testing.assert_close(unrelated, 3 * row / row.norm(), atol=1e-5, rtol=1e-5)


def test_a_reconstruction_is_the_saes_whatever_alpha(
    steering: Steering, encoder: LatentEncoder
) -> None:
    x = torch.randn(1, 10, 32, generator=torch.Generator().manual_seed(0))
    found = x + edited(steering, "reconstruction", 9.0, list(range(10)))
    torch.testing.assert_close(found, encoder.reconstruct(x), atol=1e-5, rtol=1e-5)


def test_alpha_zero_is_the_model_as_it_is_to_the_bit(any_tiny_lm: Path, tmp_path: Path) -> None:
    model = WholeModel.load(any_tiny_lm)
    generator = torch.Generator().manual_seed(0)
    W_dec = torch.randn(40, 32, generator=generator)
    encoder = LatentEncoder(
        W=W_dec.T.contiguous(), b=torch.zeros(40), theta=torch.zeros(40), k=None,
        input_norm="none", W_dec=W_dec, b_dec=torch.zeros(32),
        hook_point=HookPoint.parse("blocks.1.hook_resid_post"), model_name=None,
    )  # fmt: skip
    steering = Steering(model, encoder, 3)
    everywhere = torch.ones(len(IDS), dtype=torch.bool)
    with torch.inference_mode():
        plain = model.logits(torch.tensor([IDS]))[0].float().log_softmax(-1)
    for arm, alpha in (("none", 5.0), ("latent", 0.0), ("random", 0.0)):
        seen = steering.log_probs(IDS, arm, alpha, everywhere, steer_answer=True)  # pyright: ignore
        assert torch.equal(seen, plain), arm
    moved = steering.log_probs(IDS, "latent", 5.0, everywhere, steer_answer=True)
    assert not torch.equal(moved, plain)


def test_tokens_before_the_first_steered_one_do_not_notice(steering: Steering) -> None:
    late = torch.arange(len(IDS)) >= 6
    plain, moved = (
        steering.log_probs(IDS, arm, 20.0, late, steer_answer=False) for arm in ("none", "latent")
    )
    torch.testing.assert_close(moved[:6], plain[:6], atol=1e-5, rtol=1e-5)
    assert (moved[6:] - plain[6:]).abs().amax(-1).min() > 1e-3


def test_a_token_at_a_time_gives_what_the_whole_sequence_does(steering: Steering) -> None:
    """The cache, the mask and the count of tokens seen go together."""
    mask = torch.arange(len(IDS)) % 2 == 0
    for arm in ("none", "latent", "reconstruction"):
        for steer_answer in (True, False):
            said = steering.answer(
                IDS, arm, 15.0, mask, steer_answer=steer_answer, max_new_tokens=8, ends=()
            )
            whole: list[int] = []
            while len(whole) < 8:
                place = steering.log_probs(IDS + whole, arm, 15.0, mask, steer_answer=steer_answer)
                whole.append(int(place[-1].argmax()))
            assert said == whole, (arm, steer_answer)


def test_every_arm_answers_beside_the_unsteered_answer(steering: Steering, tiny_lm: Path) -> None:
    tokenizer = ChatTokenizer.load(tiny_lm)
    answers = list(steer(steering, tokenizer, PROMPTS, (0.0, 30.0), max_new_tokens=6))
    for number in (0, 1):
        own = [one for one in answers if one.prompt == number]
        assert [one.arm for one in own][:2] == ["none", "reconstruction"]
        assert len(own) == 2 + 2 * 4
        by = {(one.arm, one.alpha): one for one in own}
        assert by["none", 0].kl == 0
        assert by["none", 0].agreement == 1
        for arm in ("latent", "flipped", "random", "unrelated"):
            assert by[arm, 0].text == by["none", 0].text
            assert by[arm, 0].kl == 0
            assert by[arm, 30].kl > 1e-4
    again = list(steer(steering, tokenizer, PROMPTS, (0.0, 30.0), max_new_tokens=6))
    assert again == answers


def test_only_the_chosen_kinds_of_tokens_are_steered(steering: Steering, tiny_lm: Path) -> None:
    tokenizer = ChatTokenizer.load(tiny_lm)
    none = steer(
        steering, tokenizer, PROMPTS[:1], (30.0,), kinds=(), steer_answer=False, max_new_tokens=3
    )
    assert all(one.kl == 0 for one in none)
    special = steer(
        steering, tokenizer, PROMPTS[:1], (30.0,), kinds=(Kind.SPECIAL,), steer_answer=False,
        max_new_tokens=3,
    )  # fmt: skip
    assert all(one.kl > 1e-4 for one in special if one.arm != "none")


def test_each_special_token_has_the_latent_of_the_largest_mean_maximum(
    tiny_lm: Path, encoder: LatentEncoder
) -> None:
    tokenizer = ChatTokenizer.load(tiny_lm)
    model = LanguageModel.load(tiny_lm, [encoder.hook_point])
    conversations = [Conversation(str(i), one) for i, one in enumerate(PROMPTS)]
    instances, _ = chat_instances(tokenizer, conversations)
    found = {one.token: one for one in special_latents(model, encoder, instances)}
    names = {str(tokenizer.tokenizer.decode([token])) for token in found}
    assert names == {"<|im_start|>", "<|im_end|>", "user"}
    for token, one in found.items():
        maxima = []
        for instance in instances:
            x = model.read(torch.from_numpy(instance[None, :, 2]).long())[encoder.hook_point][0]
            at = np.flatnonzero((instance[:, 2] == token) & (instance[:, 3] >= Kind.ROLE))
            maxima.append(encoder.encode(x)[at].amax(0))
        mean = torch.stack(maxima).mean(0)
        assert one.latent == int(mean.argmax())
        assert one.mean_max == pytest.approx(float(mean.max()), rel=1e-4)
        assert one.num_conversations == 2


def test_what_cannot_be_steered_is_refused(tiny_lm: Path, encoder: LatentEncoder) -> None:
    model = WholeModel.load(tiny_lm)
    with pytest.raises(ModelError, match="latent=64, but the SAE has latents 0 to 63"):
        Steering(model, encoder, 64)
    tokenizer = ChatTokenizer.load(tiny_lm)
    with pytest.raises(TaskError, match="prompt 0 cannot be asked"):
        next(steer(Steering(model, encoder, 0), tokenizer, [[]]))


def test_agreement_is_how_far_two_answers_go_together() -> None:
    assert agreement([1, 2, 3], [1, 2, 3]) == agreement([], []) == 1
    assert agreement([1, 2, 3, 4], [1, 2]) == 0.5
    assert agreement([1, 2], [3, 2]) == 0
