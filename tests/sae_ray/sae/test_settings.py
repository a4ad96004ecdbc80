"""Settings of a training: what cannot be is refused in one line that says what to do."""

import pytest
from transformers import LlamaConfig

from sae_ray.config import JobConfig
from sae_ray.errors import ConfigError, ModelError
from sae_ray.sae.settings import TrainSettings

CONFIG = LlamaConfig(
    hidden_size=32, num_attention_heads=4, num_hidden_layers=3, max_position_embeddings=512
)
POINTS = ["blocks.1.hook_resid_post", "blocks.0.attn.hook_z"]


def settings(**values: object) -> TrainSettings:
    return TrainSettings.model_validate({"hook_points": POINTS, **values})


def test_the_grid_is_hook_points_by_architectures_by_widths_by_seeds() -> None:
    specs = settings(archs=["topk", "standard"], widths=[64, 128], seeds=[0, 1]).specs(CONFIG, "m")
    assert len({spec.name for spec in specs}) == 16
    (one, other) = settings(archs=["topk"]).specs(CONFIG, "m")
    assert one.d_sae == other.d_sae == 256
    (jump,) = settings(archs=["jumprelu"], hook_points=POINTS[:1], sparsity=0.1).specs(CONFIG, "m")
    assert (jump.k, jump.sparsity) == (None, 0.1)


def test_the_papers_jumprelu_has_its_penalty_and_no_target() -> None:
    paper = settings(preset="fast_paper", archs=["jumprelu", "standard"], hook_points=POINTS[:1])
    jump, standard = paper.specs(CONFIG, "m")
    assert (jump.k, paper.recipe().sparsity_of(jump)) == (None, 0.01)
    assert paper.recipe().sparsity_of(standard) == 5.0
    assert paper.room_batches * 128 >= 8 * paper.tokens_per_forward
    (aimed,) = settings(
        preset="fast_paper", archs=["jumprelu"], hook_points=POINTS[:1], k=16
    ).specs(CONFIG, "m")
    assert aimed.k == 16


def test_the_budget_is_over_all_workers() -> None:
    assert settings(num_tokens=81920).recipe().num_steps == 20
    assert settings(num_tokens=81920, num_workers=2).recipe().num_steps == 10
    placed = settings(num_tokens=81920, num_workers=2, placement="saes")
    assert placed.recipe().num_steps == 20
    paper = settings(preset="fast_paper", num_tokens=40_960_000).recipe()
    assert (paper.num_steps, paper.batch_tokens, paper.learning_rate) == (320_000, 128, 7e-5)


def test_lengths_follow_the_model() -> None:
    found = settings().arrangement(CONFIG)
    assert (found.max_tokens, found.block_tokens) == (512, 512)
    with pytest.raises(ConfigError, match="max_tokens=513, but the model has 512 positions"):
        settings(max_tokens=513).arrangement(CONFIG)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hook_points": ["blocks.9.hook_resid_post"]}, "layers 0 to 2"),
        ({"hook_points": ["blocks.x"]}, "is not known"),
        ({"archs": ["topk"], "widths": [16], "k": 17}, "k=17 of d_sae=16"),
        ({"widths": [0]}, "d_sae=0"),
        ({"archs": []}, "no SAE is asked for"),
    ],
)
def test_what_cannot_be_is_refused(values, message) -> None:
    with pytest.raises((ConfigError, ModelError), match=message):
        settings(**values).specs(CONFIG, "m")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lm", "m"], "without --data"),
        (["--num_workers", "2", "--min_workers", "3"], "more than --num_workers"),
        (["--placement", "saes"], "at least 2"),
        (["--archs", "sparse"], "archs"),
        (["--archs", "batchtopk", "--sparsity", "3"], "--sparsity does nothing for batchtopk"),
        (["--archs", "standard", "--k", "8"], "--k does nothing for standard"),
        (["--regime", "fast", "--block_tokens", "512"], "--block_tokens does nothing with"),
        (["--regime", "bt_f", "--max_tokens", "100"], "--max_tokens does nothing with"),
    ],
)
def test_flags_that_do_not_fit_together(flags, message) -> None:
    assert issubclass(TrainSettings, JobConfig)
    with pytest.raises(ConfigError, match=message):
        TrainSettings.parse(flags)
