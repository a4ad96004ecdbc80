"""With a SAE that was trained: it finds the span from few examples, and has a floor of its own."""

import functools

import numpy as np
import pytest
import torch
from torch import Tensor

from sae_ray.adapters.basis import BasisRule, build_basis
from sae_ray.adapters.contrast import Contrast
from tests.sae_ray.adapters.planted import (
    D,
    N,
    R,
    World,
    captured,
    contrastive_pca,
)  # fmt: skip
from tests.sae_ray.adapters.test_contrast import compare

D_SAE, K, STEPS, BATCH = 512, 16, 1600, 1024


@functools.cache
def trained(corr: bool) -> tuple[World, tuple[Tensor, Tensor, Tensor], Tensor]:
    """Train a TopK SAE on a world's states, as many of one label as of the other."""
    world = World.make(0, corr=corr)
    generator = torch.Generator().manual_seed(0)
    W_dec = torch.nn.functional.normalize(torch.randn(D_SAE, D, generator=generator), dim=-1)
    parameters = [W_dec.T.clone(), torch.zeros(D_SAE), W_dec, torch.zeros(D)]
    W_enc, b_enc, W_dec, b_dec = (one.requires_grad_() for one in parameters)
    optimizer = torch.optim.Adam([W_enc, b_enc, W_dec, b_dec], lr=2e-3)
    rng = np.random.default_rng(5)
    for step in range(STEPS):
        halves = [world.codes(rng, BATCH // 2, task=task, nuisance=False) for task in (True, False)]
        x = torch.from_numpy(world.states(np.concatenate(halves), step)).float()
        z = encode(x, W_enc, b_enc, b_dec)
        loss = (x - z @ W_dec - b_dec).square().sum(-1).mean()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, 3 * (1 - step / STEPS))
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            W_dec /= W_dec.norm(dim=-1, keepdim=True)
    unexplained = loss.item() / x.var(0).sum().item()  # pyright: ignore[reportPossiblyUnboundVariable]
    assert unexplained < 0.12, "the SAE is to be a good one"
    return world, (W_enc.detach(), b_enc.detach(), b_dec.detach()), W_dec.detach()


def encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor) -> Tensor:
    values, where = ((x - b_dec) @ W_enc + b_enc).relu().topk(K, dim=-1)
    return torch.zeros(len(x), D_SAE).scatter(-1, where, values)


@functools.cache
def compared(corr: bool, num: int) -> tuple[World, Contrast, Tensor, float]:
    """Contrast latents of `num` examples of each label; and what contrastive PCA gets of them."""
    world, encoder, W_dec = trained(corr)
    states = [world.states(one, seed) for seed, one in enumerate(world.sample(1, num))]
    latents = [encode(torch.from_numpy(x).float(), *encoder).numpy() for x in states]
    return world, compare(*latents), W_dec, captured(contrastive_pca(*states), world)


def share(corr: bool, num: int, k: int, score: str = "t", power: float = 0.0) -> float:
    world, found, W_dec, _ = compared(corr, num)
    chosen = found.select(k, score)  # pyright: ignore[reportArgumentType]
    scores = torch.from_numpy(found.scores(score)[chosen])  # pyright: ignore[reportArgumentType]
    rule = BasisRule(power=power, tau=1.0, r_max=R)
    basis = build_basis(W_dec, torch.from_numpy(chosen), scores, rule)
    return captured(basis.U.double().numpy(), world)


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.timeout(900)
def test_a_trained_sae_finds_most_of_the_span_and_not_more_with_more_examples():
    few, many = share(False, 200, R), share(False, 2000, R)
    assert 0.85 <= many <= 0.97
    assert few > 0.75
    direct = {num: compared(False, num)[-1] for num in (200, 20_000)}
    assert few > direct[200] + 0.2, "few examples: the SAE wins"
    assert direct[20_000] > share(False, 20_000, R), "many, and no correlation: it does not"


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.timeout(900)
def test_where_features_are_correlated_t_and_the_sae_win():
    by_t, by_delta = (share(True, 2000, R, score) for score in ("t", "abs_delta"))
    assert by_t > by_delta + 0.2
    assert by_t > compared(True, 20_000)[-1]


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.timeout(900)
def test_many_latents_need_weights():
    top = share(False, 2000, R)
    assert abs(share(False, 2000, 64, power=2.0) - top) <= 0.03
    assert share(False, 2000, 64, power=0.0) < 0.4


def test_centring_would_take_out_what_chosen_latents_share():
    generator = torch.Generator().manual_seed(0)
    common = torch.nn.functional.normalize(torch.randn(D, generator=generator), dim=0)
    rows = 0.6 * common + 0.8 * torch.nn.functional.normalize(
        torch.randn(N, D, generator=generator), dim=-1
    )
    chosen = torch.arange(16)
    U = build_basis(rows, chosen, torch.ones(16), BasisRule(tau=1.0, r_max=R)).U
    centred = rows[:16] - rows[:16].mean(0)
    away = torch.linalg.svd(centred, full_matrices=False)[2][:R].T
    assert (U.T @ common).square().sum() > 0.8
    assert (away.T @ common).square().sum() < 0.2
