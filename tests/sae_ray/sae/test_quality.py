"""SAE quality: figures of a SAE whose errors are known."""

import pytest
import torch

from sae_ray.lm import HookPoint
from sae_ray.sae.encoder import LatentEncoder
from sae_ray.sae.quality import measure


def test_quality_of_a_known_sae() -> None:
    # Four latents for the axes of a plane and their opposites: nothing is lost in the plane.
    encoder = LatentEncoder(
        W=torch.tensor([[1.0, 0, -1, 0, 0], [0, 1, 0, -1, 0], [0, 0, 0, 0, 0]]),
        b=torch.tensor([0, 0, 0, 0, -1.0]),
        theta=torch.zeros(5),
        k=None,
        input_norm="none",
        W_dec=torch.tensor([[1.0, 0, 0], [0, 1, 0], [-1, 0, 0], [0, -1, 0], [0, 0, 1]]),
        b_dec=torch.zeros(3),
        hook_point=HookPoint.parse("blocks.1.hook_resid_post"),
        model_name=None,
    )
    x = torch.tensor([[1.0, 0, 1], [-1, 0, -1], [0, 1, 0], [0, -1, 0]])
    quality = measure(encoder, [x[:1], x[1:]])
    # Squared error 2 in the third axis; variance about the zero mean 6.
    assert quality.fvu == pytest.approx(2 / 6)
    assert quality.l0 == 1.0
    assert quality.dead == pytest.approx(1 / 5)
    assert quality.dense == pytest.approx(4 / 5)
