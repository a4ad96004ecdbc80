"""Statistics of latents: exact as they stream, honest about chance, and where they lose."""

import numpy as np
import pytest
import torch

from sae_ray.adapters.basis import BasisRule, build_basis
from sae_ray.adapters.contrast import Contrast, contrast
from sae_ray.adapters.pooling import PooledRow
from sae_ray.errors import TaskError
from tests.sae_ray.adapters.planted import (
    NUISANCE,
    TASK,
    D,
    N,
    R,
    World,
    captured,
    contrastive_pca,
    pca,
    residual,
)  # fmt: skip


def pooled(codes: np.ndarray, prefix: str, lengths: np.ndarray | int = 10) -> list[PooledRow]:
    """Codes as rows of conversations whose replies have so many tokens."""
    rows = []
    lengths = np.broadcast_to(lengths, len(codes))
    for number, (z, length) in enumerate(zip(codes, lengths, strict=True)):
        on = np.flatnonzero(z)
        rows.append(
            PooledRow(
                id=f"{prefix}{number}",
                num_tokens=int(length),
                latents=on.astype(np.int32),
                means=z[on].astype(np.float32),
                counts=np.ones(len(on), dtype=np.int32),
                first=np.zeros(len(on), dtype=np.float32),
                unexplained=0.1,
                spread=1.0,
            )
        )
    return rows


def compare(positive: np.ndarray, reference: np.ndarray, **settings) -> Contrast:
    sets = pooled(positive, "p"), pooled(reference, "r")
    share = len(positive) / (len(positive) + len(reference))
    return contrast(positive.shape[1], *sets, share=share, **settings)


def basis_of(found: Contrast, world: World, k: int, score="t", **rule) -> np.ndarray:
    chosen = found.select(k, score)  # pyright: ignore[reportArgumentType]
    scores = torch.from_numpy(found.scores(score)[chosen])  # pyright: ignore[reportArgumentType]
    W_dec = torch.from_numpy(world.dictionary).float()
    rule = BasisRule(**({"r_max": R, "tau": 1.0} | rule))
    return build_basis(W_dec, torch.from_numpy(chosen), scores, rule).U.double().numpy()


def test_streaming_sums_give_what_all_rows_at_once_do():
    world = World.make(0)
    positive, reference = world.sample(0, 500)
    found = compare(positive, reference)
    p, r = positive.astype(np.float32).astype(float), reference.astype(np.float32).astype(float)
    delta = p.mean(0) - r.mean(0)
    error = p.var(0, ddof=1) / len(p) + r.var(0, ddof=1) / len(r)
    np.testing.assert_allclose(found.t, delta / np.sqrt(error), rtol=1e-9, atol=1e-9)
    pooled_sd = np.sqrt((p.var(0, ddof=1) + r.var(0, ddof=1)) / 2)
    np.testing.assert_allclose(found.effect, delta / pooled_sd, rtol=1e-9, atol=1e-9)


def test_t_at_equal_length_is_that_of_a_regression():
    world = World.make(0)
    positive, reference = world.sample(0, 300)
    rng = np.random.default_rng(0)
    lengths = rng.integers(20, 60, 300), rng.integers(5, 30, 300)
    sets = pooled(positive, "p", lengths[0]), pooled(reference, "r", lengths[1])
    found = contrast(N, *sets, share=0.5)
    X = np.stack([np.repeat([1.0, 0.0], 300), np.ones(600), np.log(np.concatenate(lengths))], 1)
    z = np.concatenate([positive, reference]).astype(np.float32).astype(float)
    beta, squares, *_ = np.linalg.lstsq(X, z, rcond=None)
    error = np.sqrt(squares / (600 - 3) * np.linalg.inv(X.T @ X)[0, 0])
    on = z.any(0)
    assert on.sum() > 200
    np.testing.assert_allclose(found.t_at_length[on], beta[0, on] / error[on], rtol=1e-6, atol=1e-8)
    assert "differ in length" in found.warnings[0]


def test_what_only_tells_long_from_short_is_dropped():
    rng = np.random.default_rng(0)
    lengths = rng.integers(40, 80, 400), rng.integers(10, 45, 400)
    codes = []
    for label, length in zip((1, 0), lengths, strict=True):
        z = (rng.random((400, 20)) < 0.3) * 1.0
        z[:, 0] = np.maximum(
            0, np.log(length) - 2 + 0.05 * rng.standard_normal(400)
        )  # length alone
        z[:, 1] = rng.random(400) < (0.5 if label else 0.2)  # the label alone
        codes.append(z)
    sets = pooled(codes[0], "p", lengths[0]), pooled(codes[1], "r", lengths[1])
    found = contrast(20, *sets, share=0.5)
    assert abs(found.t[0]) > found.threshold
    assert found.select().tolist() == [1]


def test_on_shuffled_labels_few_comparisons_select_anything():
    world = World.make(0)
    false = 0
    for seed in range(40):
        codes = world.codes(np.random.default_rng(seed), 160, task=False, nuisance=False)
        found = compare(codes[:80], codes[80:], seed=seed)
        try:
            found.select()
            false += 1
        except TaskError:
            continue
    assert false <= 6, "5 % of 40 are 2; more than 6 has a chance of 1 %"


def test_filters_drop_rare_dense_and_sink_latents():
    rng = np.random.default_rng(0)
    positive, reference = (rng.random((200, 4)) < 0.1 for _ in range(2))
    positive, reference = positive * 1.0, reference * 1.0
    positive[:, 0], reference[:, 0] = np.arange(200) < 9, 0  # in nine conversations only
    positive[:, 1] = rng.random(200) < 0.5
    positive[:, 2] = rng.random(200) < 0.5
    positive[:, 3] = rng.random(200) < 0.5
    sets = pooled(positive, "p"), pooled(reference, "r")
    for row in [*sets[0], *sets[1]]:
        row.first[row.latents == 1] = 100.0  # mostly at the first token
        row.counts[row.latents == 2] = 10  # at every token of a reply
    for row in sets[1]:
        row.counts[row.latents == 3] = 1
    reference_dense = [row for row in sets[1] if 2 in row.latents] * 10
    found = contrast(4, *sets, retain=reference_dense, share=0.5)
    assert found.eligible.tolist() == [False, False, False, True]
    assert found.select().tolist() == [3]


def test_too_few_conversations_or_another_models_sae_are_refused():
    codes = np.ones((12, 3))
    with pytest.raises(TaskError, match="the reference set has 5 conversations"):
        compare(codes, codes[:5])
    rows = [PooledRow(**{**vars(row), "unexplained": 0.9}) for row in pooled(codes, "p")]
    with pytest.raises(TaskError, match="leaves 90% of the variance of the positive set's"):
        contrast(3, rows, pooled(codes, "r"), share=0.5)


# What follows is the theory of the method, sails.md 7.10.7: one direction cannot be a subspace, a
# dictionary finds it from few examples, second moments find it without one from many.


def test_the_mean_difference_never_passes_the_floor_of_one_direction():
    world = World.make(0)
    positive, reference = (world.states(codes, 0) for codes in world.sample(0, 10_000))
    found = residual(positive.mean(0) - reference.mean(0), world)
    assert np.sqrt(R - 1) <= found < np.sqrt(R - 1) + 0.02


@pytest.mark.parametrize("seed", [0, 1])
def test_a_dictionary_recovers_the_span_and_t_beats_the_plain_difference(seed):
    world = World.make(seed)
    found = compare(*world.sample(seed, 1000))
    assert captured(basis_of(found, world, R), world) > 0.999
    assert set(found.select(R).tolist()) == set(TASK.tolist())


def test_t_beats_the_plain_difference_where_features_are_correlated():
    gains = []
    for seed in range(6):
        world = World.make(seed, corr=True)
        found = compare(*world.sample(seed, 100))
        by_t, by_delta = (
            captured(basis_of(found, world, R, score), world) for score in ("t", "abs_delta")
        )
        gains.append(by_t - by_delta)
    assert np.mean(gains) > 0.2


def test_second_moments_win_without_a_dictionary_where_examples_are_many():
    world = World.make(0)
    codes = world.sample(0, 10_000)
    positive, reference = (world.states(one, seed) for seed, one in enumerate(codes))
    assert captured(pca(np.concatenate([positive, reference])), world) < 0.2
    assert captured(contrastive_pca(positive, reference), world) > 0.9


def test_a_confounder_halves_recovery_and_a_control_set_mends_it():
    without = []
    for seed in range(5):
        world = World.make(seed, confound=True)
        positive, reference = world.sample(seed, 2000)
        found = compare(positive, reference)
        without.append(captured(basis_of(found, world, R), world))
        shared = world.codes(np.random.default_rng(9), 2000, task=False, nuisance=True)
        mended = compare(positive, reference, control=pooled(shared, "c"))
        assert captured(basis_of(mended, world, R), world) > 0.9
        assert not set(mended.select(R).tolist()) & set(NUISANCE.tolist())
    assert np.mean(without) < 0.65


def test_a_perturbed_dictionary_errs_less_than_wedins_bound():
    world = World.make(0)
    rng = np.random.default_rng(1)
    smallest = np.linalg.svd(world.dictionary[TASK])[1][-1]
    for eps in (0.01, 0.03, 0.1, 0.3, 1.0):
        noise = rng.standard_normal((R, D))
        noise *= eps / np.linalg.norm(noise, axis=1, keepdims=True)
        U = np.linalg.qr((world.dictionary[TASK] + noise).T)[0]
        error = np.linalg.norm(U @ U.T - world.span @ world.span.T)
        assert error <= np.sqrt(2) * np.linalg.norm(noise) / smallest
        assert error > eps / 3, "and the bound is no empty one"


def test_weights_keep_many_latents_from_drowning_the_few_that_matter():
    world = World.make(0)
    found = compare(*world.sample(0, 2000))
    assert captured(basis_of(found, world, 64, power=2.0), world) > 0.95
    assert captured(basis_of(found, world, 64, power=0.0), world) < 0.4


def test_atoms_are_the_latents_themselves_or_refused():
    world = World.make(0)
    found = compare(*world.sample(0, 1000))
    U = basis_of(found, world, 20, atoms=True)
    chosen = found.select(R)
    np.testing.assert_allclose(U.T, world.dictionary[chosen], atol=1e-6)
    twice = torch.from_numpy(world.dictionary).float()
    twice[chosen[1]] = twice[chosen[0]]
    with pytest.raises(TaskError, match="nearly dependent"):
        build_basis(twice, torch.from_numpy(chosen), torch.ones(R), BasisRule(atoms=True))
