"""Logit lens: what the whole model's own norm and head say of a direction."""

from pathlib import Path

import pytest
import torch

from sae_ray.lm import HookPoint
from sae_ray.sae.lens import LogitLens
from sae_ray.sae.splice import WholeModel


@pytest.mark.parametrize("name", ["blocks.1.hook_resid_post", "blocks.1.attn.hook_z"])
def test_the_part_that_is_loaded_sees_what_the_whole_model_does(
    any_tiny_lm: Path, name: str
) -> None:
    point = HookPoint.parse(name)
    directions = torch.randn(300, 32, generator=torch.Generator().manual_seed(0))
    whole = WholeModel.load(any_tiny_lm)
    expected = LogitLens(whole, point).logits(directions)
    torch.testing.assert_close(LogitLens.load(any_tiny_lm, point).logits(directions), expected)
    # Logits are linear in a direction's length only up to the norm: the order never changes.
    longer = LogitLens(whole, point).logits(5 * directions)
    assert longer.argmax(-1).tolist() == expected.argmax(-1).tolist()
    rows = list(LogitLens(whole, point).promoted(directions, 3))
    assert [row.up[0][0] for row in rows] == expected.argmax(-1).tolist()
    assert [row.down[0][0] for row in rows] == expected.argmin(-1).tolist()
    assert [value for _, value in rows[7].up] == sorted(expected[7].tolist())[: -3 - 1 : -1]


def test_a_direction_that_is_written_into_the_last_layer_moves_these_logits(
    any_tiny_lm: Path,
) -> None:
    """Far along a direction, the norm sees nothing else: the model's logits are the lens'."""
    model = WholeModel.load(any_tiny_lm)
    last = HookPoint(model.model.config.num_hidden_layers - 1, "resid_post")
    direction = torch.randn(32, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([[5, 6, 7]])
    logits = [
        model.logits(ids, {last: lambda x, to=to: torch.zeros_like(x) + to})[0, -1]
        for to in (1e3 * direction, 0 * direction)
    ]
    moved = logits[0] - logits[1]
    seen = LogitLens.load(any_tiny_lm, last).logits(1e3 * direction[None])[0]
    soft = getattr(model.model.config, "final_logit_softcapping", None)
    seen = soft * torch.tanh(seen / soft) if soft else seen
    torch.testing.assert_close(moved, seen, atol=1e-3, rtol=1e-3)
