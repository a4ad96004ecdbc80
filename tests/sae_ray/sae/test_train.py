"""Training a SAE: it learns planted directions, and what is saved is what was trained."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from sae_ray.lm import HookPoint
from sae_ray.sae.encoder import LatentEncoder
from sae_ray.sae.quality import measure, measure_sae
from sae_ray.sae.train import (
    Step,
    TrainConfig,
    fvu,
    new_sae,
    save,
    scale_of,
    train,
    train_on_instances,
)

pytestmark = [
    pytest.mark.slow,  # sae-lens takes 8 s to import
    pytest.mark.filterwarnings("ignore:The 'utils' module has been deprecated:DeprecationWarning"),
]

CONFIG = TrainConfig(d_sae=48, k=3, num_steps=400, learning_rate=1e-2, warmup_steps=5)
HOOK = "blocks.1.hook_resid_post"


def planted(seed: int, scale: float = 5.0) -> Iterator[torch.Tensor]:
    """Yield sums of three of 24 fixed directions, with a mean of their own."""
    directions = torch.nn.functional.normalize(
        torch.randn(24, 16, generator=torch.Generator().manual_seed(7)), dim=1
    )
    generator = torch.Generator().manual_seed(seed)
    while True:
        chosen = torch.rand(256, 24, generator=generator).argsort(dim=1)[:, :3]
        strength = 1 + torch.rand(256, 3, 1, generator=generator)
        yield scale * ((directions[chosen] * strength).sum(dim=1) + 1.0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Step]]:
    stream = planted(0)
    sample = next(stream)
    scale = scale_of(sample)
    sae = new_sae(sample, CONFIG, model_name="m", hook_name=HOOK)
    steps = list(train(sae, stream, CONFIG, scale=scale))
    folder = tmp_path_factory.mktemp("sae")
    save(sae, folder, scale=scale)
    return folder, steps


def test_the_loss_falls_and_l0_is_k(trained: tuple[Path, list[Step]]) -> None:
    _, steps = trained
    assert len(steps) == CONFIG.num_steps
    assert steps[-1].fvu < 0.3 * steps[0].fvu
    assert steps[-1].fvu < 0.2
    assert all(step.l0 <= CONFIG.k + 1e-6 for step in steps)
    assert steps[0].learning_rate < CONFIG.learning_rate
    assert steps[-1].learning_rate < 0.1 * CONFIG.learning_rate


def test_the_saved_sae_reads_activations_in_the_models_own_scale(
    trained: tuple[Path, list[Step]],
) -> None:
    folder, steps = trained
    quality = measure(LatentEncoder.load(folder), itertools.islice(planted(1), 10))
    assert quality.fvu == pytest.approx(steps[-1].fvu, abs=0.05)
    assert quality.l0 == pytest.approx(CONFIG.k, rel=0.35)
    assert quality.num_tokens == 2560
    assert 0 <= quality.dead < 1
    assert 0 <= quality.dense <= 1


def test_sae_lens_loads_it_and_agrees(trained: tuple[Path, list[Step]]) -> None:
    from sae_lens import SAE  # noqa: PLC0415

    folder, _ = trained
    sae = SAE.load_from_disk(folder)
    x = next(planted(2))
    assert sae.cfg.architecture() == "jumprelu"
    assert sae.cfg.metadata.hook_name == HOOK
    with torch.no_grad():
        theirs = sae.encode(x)
        assert fvu(x, sae.decode(theirs)) < 0.25
    torch.testing.assert_close(LatentEncoder.load(folder).encode(x), theirs, atol=1e-3, rtol=1e-3)


def test_the_same_seed_trains_the_same_sae() -> None:
    config = TrainConfig(d_sae=32, k=3, num_steps=3)

    def weights() -> torch.Tensor:
        stream = planted(0)
        sae = new_sae(next(stream), config, model_name="m", hook_name=HOOK)
        assert len(list(train(sae, stream, config, scale=0.1))) == 3
        return sae.W_dec.detach().clone()

    assert torch.equal(weights(), weights())


def test_scale_gives_a_typical_token_a_norm_of_sqrt_d_in_whatever_the_sinks() -> None:
    x = torch.ones(100, 16) * 3
    x[0] *= 1e4
    assert (x[1] * scale_of(x)).norm().item() == pytest.approx(4.0)


def test_a_sae_is_trained_on_a_models_instances(tiny_lm: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [rng.integers(4, 300, size=20).astype(np.int32) for _ in range(40)]
    config = TrainConfig(d_sae=64, k=8, num_steps=30, warmup_steps=5)
    steps = train_on_instances(
        tiny_lm,
        rows,
        HookPoint.parse(HOOK),
        config,
        tmp_path,
        model_name="tiny",
        rows_per_batch=128,
        buffer_tokens=256,
    )
    fvus = [step.fvu for step in steps]
    assert len(fvus) == 30
    assert fvus[-1] < fvus[0]
    encoder = LatentEncoder.load(tmp_path)
    assert (encoder.model_name, str(encoder.hook_point)) == ("tiny", HOOK)
    quality = measure_sae(tiny_lm, tmp_path, rows)
    assert quality.num_tokens == 800
    assert quality.fvu < 1
