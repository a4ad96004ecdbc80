"""Sparse training: the same loss, gradients and threshold as sae-lens' own classes."""

import copy
from typing import Any

import pytest
import torch

from sae_ray.sae.kept import Pattern

pytestmark = [
    pytest.mark.slow,  # sae-lens takes 8 s to import
    pytest.mark.filterwarnings("ignore:The 'utils' module has been deprecated:DeprecationWarning"),
]

CASES = {
    "topk": ("SparseTopK", "TopK", {"k": 5}),
    "topk plain": (
        "SparseTopK",
        "TopK",
        {"k": 5, "rescale_acts_by_decoder_norm": False, "apply_b_dec_to_input": False},
    ),
    "topk of all": ("SparseTopK", "TopK", {"k": 64}),
    "batchtopk": ("SparseBatchTopK", "BatchTopK", {"k": 5.5}),
    "batchtopk of most": ("SparseBatchTopK", "BatchTopK", {"k": 60}),
    "matryoshka": (
        "SparseMatryoshka",
        "MatryoshkaBatchTopK",
        {"k": 5, "matryoshka_widths": [8, 32, 64]},
    ),
}


def step(sae: Any, x: torch.Tensor, dead: torch.Tensor) -> Any:
    from sae_lens.saes.sae import TrainStepInput  # noqa: PLC0415

    output = sae.training_forward_pass(
        TrainStepInput(
            sae_in=x,
            coefficients={},
            dead_neuron_mask=dead,
            n_training_steps=0,
            is_logging_step=False,
        )
    )
    output.loss.backward()
    return output


@pytest.mark.parametrize("finding", ["float64", "bfloat16"])
@pytest.mark.parametrize("num_dead", [0, 20])
@pytest.mark.parametrize("case", CASES)
def test_loss_gradients_and_threshold_are_sae_lens_own(
    case: str, num_dead: int, finding: str
) -> None:
    import sae_lens  # noqa: PLC0415

    from sae_ray.sae import sparse_training  # noqa: PLC0415

    ours, theirs, settings = CASES[case]
    config = getattr(sae_lens, f"{theirs}TrainingSAEConfig")(
        d_in=16, d_sae=64, dtype="float64", **settings
    )
    torch.manual_seed(0)
    dense = getattr(sae_lens, f"{theirs}TrainingSAE")(config)
    with torch.no_grad():
        dense.W_dec.mul_(torch.rand(64, 1) + 0.5)
        dense.b_enc.normal_(0, 0.1)
        dense.b_dec.normal_()
    sparse = getattr(sparse_training, ours)(copy.deepcopy(config))
    sparse.load_state_dict(dense.state_dict())
    sparse.finding_dtype = getattr(torch, finding)
    x = 3 * torch.randn(100, 16, dtype=torch.float64)
    dead = torch.arange(64) < num_dead
    expected, got = step(dense, x, dead), step(sparse, x, dead)
    assert expected.loss.item() == pytest.approx(got.loss.item(), rel=1e-12)
    assert expected.losses.keys() == got.losses.keys()
    for name, loss in expected.losses.items():
        assert loss.item() == pytest.approx(got.losses[name].item(), rel=1e-12)
    torch.testing.assert_close(got.feature_acts.to_dense(), expected.feature_acts)
    for (name, p), q in zip(dense.named_parameters(), sparse.parameters(), strict=True):
        assert p.grad.abs().max() > 0
        assert (p.grad - q.grad).abs().max() < 1e-9, name
    if hasattr(dense, "topk_threshold"):
        assert float(dense.topk_threshold) == pytest.approx(float(sparse.topk_threshold))


def test_a_batch_of_which_nothing_is_on_has_gradients() -> None:
    from sae_lens import BatchTopKTrainingSAEConfig  # noqa: PLC0415

    from sae_ray.sae.sparse_training import SparseBatchTopK  # noqa: PLC0415

    sae = SparseBatchTopK(BatchTopKTrainingSAEConfig(d_in=4, d_sae=8, k=2))
    with torch.no_grad():
        sae.b_enc.fill_(-100.0)
    output = step(sae, torch.randn(6, 4), torch.zeros(8, dtype=torch.bool))
    assert output.feature_acts.to_dense().abs().max() == 0
    assert sae.b_dec.grad is not None
    assert sae.b_dec.grad.abs().max() > 0
    assert sae.W_enc.grad is not None
    assert sae.W_enc.grad.abs().max() == 0


@pytest.mark.parametrize(("columns", "num"), [(2048, 32), (1000, 7), (97, 5), (64, 64), (256, 40)])
def test_the_largest_columns_are_the_largest(columns: int, num: int) -> None:
    from sae_ray.sae.sparse_training import largest_columns  # noqa: PLC0415

    ranks = torch.randn(20, columns)
    found = largest_columns(ranks, num)
    assert all(len(set(row)) == num for row in found.tolist())
    expected = ranks.topk(num).values
    assert torch.equal(ranks.gather(1, found).sort(descending=True).values, expected)


def test_products_with_a_pattern_are_the_dense_ones() -> None:
    torch.manual_seed(0)
    dense = torch.randn(7, 12) * (torch.rand(7, 12) > 0.7)
    dense[3] = 0
    pattern = Pattern.of_places(dense.flatten().nonzero().squeeze(1), 7, 12)
    values = dense[dense != 0]
    W, a = torch.randn(12, 5), torch.randn(7, 5)
    torch.testing.assert_close(pattern.spread(values, W), dense @ W)
    torch.testing.assert_close(pattern.collect(values, a), dense.T @ a)
    torch.testing.assert_close(pattern.collect_sum(values), dense.sum(0))
    torch.testing.assert_close(pattern.gather_dot(a, W), (a @ W.T)[dense != 0])
    assert pattern.counts().tolist() == (dense != 0).sum(0).tolist()
