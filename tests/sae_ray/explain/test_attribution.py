"""Attribution: scores add up, name what was planted, and find nothing where there is nothing."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel

from sae_ray.adapters.attach import AdapterSpec, attach
from sae_ray.adapters.edits import LATENT_KINDS
from sae_ray.adapters.examples import Example, PairExample
from sae_ray.errors import ModelError
from sae_ray.explain.attribution import attribute, overlap, pushes, screen
from sae_ray.explain.dial import Dial, units_of
from sae_ray.explain.verification import verify
from tests.sae_ray.explain.planted import edit_of, learn, plant, rows_said_by

POINTS = ("blocks.0.hook_resid_post", "blocks.1.hook_mlp_out")


def shaken(model: PeftModel, scale: float) -> PeftModel:
    """Give an adapter values, as training would."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "latent_edit" in name:
                value.copy_(scale * torch.randn(value.shape, generator=generator))
    return model


@pytest.fixture
def rows(tiny_lm: Path, whole: Callable) -> list[Example]:
    return rows_said_by(whole(tiny_lm), 24, 0)


@pytest.mark.parametrize("kind", LATENT_KINDS)
def test_scores_of_two_sites_add_up_to_the_change(kind, rows, any_tiny_lm, whole, sae_at) -> None:
    saes = tuple(sae_at(point, seed) for seed, point in enumerate(POINTS))
    spec = AdapterSpec(kind=kind, sae=saes)
    if kind == "residual":
        spec = AdapterSpec(kind=kind, sae=saes, hidden=5)
    model = shaken(attach(whole(any_tiny_lm), spec), 0.15)
    dial, units = Dial(model, 0), units_of(rows)
    assert dial.num_latents == 128
    on, off = np.ones(128, dtype=np.float32), np.zeros(128, dtype=np.float32)
    tuned = dial.looks(units, on)
    with torch.no_grad(), model.disable_adapter():
        base = dial.looks(units, on)
    np.testing.assert_allclose(dial.looks(units, off), base, atol=1e-4)
    found = attribute(dial, units)
    assert abs(found.effect - (tuned - base).sum()) < 1e-3
    assert abs(tuned - base).sum() > 0.1
    # Of what opposes each other little may be left: the bar is then the sum of both.
    missing = abs(found.scores.sum() - found.effect)
    assert missing <= max(0.05 * abs(found.effect), 0.005 * np.abs(found.scores).sum())
    assert found.scores.shape == (128,)
    # No latent's edit is without effect, at either site.
    assert (found.scores[:64] != 0).mean() > 0.5
    assert (found.scores[64:] != 0).mean() > 0.5


def test_a_slope_is_what_a_small_turn_does(rows, tiny_lm, whole, sae_at) -> None:
    spec = AdapterSpec(kind="affine", sae=(sae_at(POINTS[0]),))
    dial = Dial(shaken(attach(whole(tiny_lm), spec), 0.1), 0)
    units, dials = units_of(rows), np.zeros(64, dtype=np.float32)
    first = screen(dial, units)
    np.testing.assert_allclose(pushes(dial, units).sum(0), first, atol=1e-3)
    for latent in (0, 17, 63):
        up, down = dials.copy(), dials.copy()
        up[latent], down[latent] = 0.2, -0.2
        moved = (dial.looks(units, up) - dial.looks(units, down)).sum() / 0.4
        assert moved == pytest.approx(first[latent], rel=0.1, abs=0.02)


def test_a_planted_latent_is_ranked_first_and_verified(tiny_lm, whole, sae_at) -> None:
    sae = sae_at("blocks.1.hook_resid_post")
    found = []
    for seed, latent in enumerate((7, 40)):
        train, held = plant(whole, tiny_lm, sae, latent, 4.0, seed)
        dial = Dial(learn(whole(tiny_lm), sae, train, l1=0.01), 0)
        one = attribute(dial, units_of(held[:48]))
        found.append(one)
        assert one.order[0] == latent
        assert one.beyond_chance[latent]
        assert one.effect > 0
        assert one.gap <= 0.05
        *steps, (done, total, result) = verify(dial, units_of(held[48:]), one, num_top=4)
        assert steps == sorted(steps, key=lambda step: step[0])
        assert done == total
        assert result is not None
        assert result.verified[0].number == latent
        assert result.verified[0].left_out.low > 0
        by = {curve.order: curve for curve in result.curves}
        assert by["attribution"].num_enough is not None
        assert by["attribution"].num_enough < by["random"].counts[-1]
        assert by["attribution"].kept[0] > by["random"].kept[0]
        assert by["attribution"].removed[2] > by["random"].removed[2]
        for curve in result.curves:
            assert curve.kept[-1] == pytest.approx(1)
            assert curve.removed[-1] == pytest.approx(1)
        assert result.agreement("added_in") > 0.8
        site, number = dial.place(latent)
        assert (str(site.point), number) == ("blocks.1.hook_resid_post", latent)
        assert 0.8 < result.kept_by_verified < 1.2
    assert overlap(found[0], found[0], 5) == 1
    assert overlap(found[0], found[1], 5) < 1


def test_where_a_coin_says_what_is_better_nothing_is_found(tiny_lm, whole, sae_at) -> None:
    model = attach(whole(tiny_lm), AdapterSpec(kind="steering", sae=(sae_at(POINTS[0]),)))
    with torch.no_grad():
        edit_of(model).steering.normal_(0, 0.3)
    said = rows_said_by(model, 160, 3)
    coins = np.random.default_rng(0).integers(2, size=80)
    pairs = [
        PairExample(a.id, a, b) if coin else PairExample(a.id, b, a)
        for a, b, coin in zip(said[:80], said[80:], coins, strict=True)
    ]
    dial, units = Dial(model, 0), units_of(pairs)
    assert units[0].signs == (1.0, -1.0)
    found = attribute(dial, units[:40], max_gap=float("inf"))
    assert found.beyond_chance.sum() <= 1
    *_, (_, _, result) = verify(dial, units[40:], found, num_top=8, num_drawn=8)
    assert result is not None
    assert len(result.verified) <= 1


def test_an_adapter_of_weights_has_no_latents_to_turn_down(tiny_lm, whole) -> None:
    with pytest.raises(ModelError, match="none of them can be turned down"):
        Dial(attach(whole(tiny_lm), AdapterSpec(kind="lora")), 0)
