"""Pooled replies are the same with workers, without, and computed by hand."""

import numpy as np
import pytest
import torch

from sae_ray.adapters.pooling import PooledRow, Skipped
from sae_ray.chat import ChatTokenizer
from sae_ray.distributed.spans import SpanWork, pooled_rows
from sae_ray.errors import ModelError
from sae_ray.lm import LanguageModel
from sae_ray.pool import plan, read
from sae_ray.sae.pretrained import load_encoder


@pytest.fixture
def work(tiny_lm, tiny_sae) -> SpanWork:
    return SpanWork(str(tiny_lm), str(tiny_sae))


def slices(tiny_pool):
    with tiny_pool.open("a") as file:
        file.write('{"messages": [{"role": "user", "content": "no reply"}]}\n{"messages": 3}\n')
    return plan(str(tiny_pool), rows_per_shard=16).slices


def test_rows_are_the_mean_latents_of_each_reply(work, tiny_pool):
    pieces = slices(tiny_pool)
    rows = list(pooled_rows(pieces, work, 0))
    encoder = load_encoder(work.sae)
    model = LanguageModel.load(work.lm, [encoder.hook_point])
    tokenizer = ChatTokenizer.load(work.lm)
    conversations = [one for piece in pieces for one in read(piece).conversations]
    pooled = {row.id: row for row in rows if isinstance(row, PooledRow)}
    assert len(pooled) == 60
    assert sorted(len(one.reason) > 5 for one in rows if isinstance(one, Skipped)) == [True, True]
    for one in conversations[:7]:
        (tokens,) = tokenizer.tokenize([one], 2048)
        x = model.read(torch.from_numpy(tokens.ids).long()[None])[encoder.hook_point][0]  # pyright: ignore[reportAttributeAccessIssue]
        z = encoder.encode(x)
        said = z[torch.from_numpy(tokens.response)]  # pyright: ignore[reportAttributeAccessIssue]
        row, dense = pooled[one.id], np.zeros(encoder.d_sae)
        dense[row.latents] = row.means
        np.testing.assert_allclose(dense, said.mean(0).numpy(), rtol=1e-4, atol=1e-5)
        dense[row.latents] = row.first
        np.testing.assert_allclose(dense, z[0].numpy(), rtol=1e-4, atol=1e-5)
        assert row.num_tokens == tokens.response.sum()  # pyright: ignore[reportAttributeAccessIssue]


def test_workers_give_the_same_rows_in_the_same_order(ray_cluster, work, tiny_pool):
    pieces = slices(tiny_pool)
    alone, together = (list(pooled_rows(pieces, work, workers)) for workers in (0, 2))
    assert [row.id for row in alone] == [row.id for row in together]
    for one, other in zip(alone, together, strict=True):
        assert type(one) is type(other)
        for name, value in vars(one).items():
            np.testing.assert_array_equal(value, getattr(other, name))


def test_what_a_worker_cannot_load_is_said_in_one_line(ray_cluster, work, tiny_pool, tmp_path):
    wrong = SpanWork(work.lm, str(tmp_path))
    with pytest.raises(ModelError, match=r"cfg\.json is missing"):
        list(pooled_rows(slices(tiny_pool), wrong, 1))
