"""FAST activations: each instance as if alone, each token once a pass, tokens mixed."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from sae_ray.lm import HookPoint, LanguageModel
from sae_ray.sae.activations import (
    MixingBuffer,
    activation_batches,
    length_buckets,
    read_instances,
)

POINT = HookPoint.parse("blocks.1.hook_resid_post")


def instances(num: int = 30) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(4, 300, size=n).astype(np.int32) for n in rng.integers(2, 40, size=num)]


@pytest.fixture
def model(tiny_lm: Path) -> LanguageModel:
    return LanguageModel.load(tiny_lm, [POINT])


def test_a_batch_gives_each_instance_what_it_has_alone(model: LanguageModel) -> None:
    rows = instances(8)
    together = read_instances(model, rows, POINT)
    alone = torch.cat([read_instances(model, [row], POINT) for row in rows])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
    assert len(together) == sum(map(len, rows))


def test_buckets_hold_every_row_once_within_the_budget() -> None:
    rows = instances(200)
    groups = list(length_buckets(rows, 128, np.random.default_rng(0)))
    assert sorted(itertools.chain(*groups)) == list(range(200))
    for group in groups:
        assert len(group) * max(len(rows[i]) for i in group) <= 128
    padded = sum(len(group) * max(len(rows[i]) for i in group) for group in groups)
    assert padded < 1.1 * sum(map(len, rows))
    first = [len(rows[group[0]]) for group in groups]
    assert first != sorted(first)
    assert first != sorted(first, reverse=True)


def test_the_buffer_loses_and_doubles_nothing() -> None:
    buffer = MixingBuffer(50, 1, seed=0)
    tokens = torch.arange(400.0).unsqueeze(1)
    out = torch.cat([buffer.exchange(part) for part in tokens.split(130)])
    assert len(out) == 350
    held = sorted(set(tokens.flatten().tolist()) - set(out.flatten().tolist()))
    assert len(set(out.flatten().tolist())) == 350
    assert len(held) == 50


def test_what_leaves_the_buffer_is_mixed() -> None:
    buffer = MixingBuffer(1000, 1, seed=0)
    tokens = torch.arange(5000.0).unsqueeze(1)
    out = torch.cat([buffer.exchange(part) for part in tokens.split(100)]).flatten()
    neighbours = (out[1:] - out[:-1]).abs()
    assert (neighbours == 1).float().mean() < 0.05
    assert neighbours.median() > 100


def test_batches_are_of_one_size_and_the_same_for_the_same_seed(model: LanguageModel) -> None:
    def some(seed: int) -> list[torch.Tensor]:
        stream = activation_batches(
            model, instances(), POINT, rows_per_batch=64, buffer_tokens=100, seed=seed
        )
        return list(itertools.islice(stream, 5))

    first = some(0)
    assert [tuple(batch.shape) for batch in first] == [(64, 32)] * 5
    assert all(torch.equal(a, b) for a, b in zip(first, some(0), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, some(1), strict=True))


def test_batches_hold_real_activations_of_the_instances(model: LanguageModel) -> None:
    rows = instances()
    known = read_instances(model, rows, POINT)
    stream = activation_batches(model, rows, POINT, rows_per_batch=32, buffer_tokens=60)
    for batch in itertools.islice(stream, 6):
        distance = torch.cdist(batch, known).min(dim=1).values
        assert distance.max() < 1e-3 * known.norm(dim=1).median()
