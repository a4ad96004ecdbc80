"""SAE quality: figures of SAEs whose errors are known, and those that sae-lens has too."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sae_ray.chat import Kind
from sae_ray.lm import HookPoint, LanguageModel
from sae_ray.sae.buffer import TokenBatch
from sae_ray.sae.encoder import LatentEncoder
from sae_ray.sae.quality import Quality, measure, measure_sae, measure_saes
from sae_ray.sae.sequences import Lanes, instance_of
from sae_ray.sae.splice import WholeModel, recovered

POINT = HookPoint.parse("blocks.1.hook_resid_post")


def plane() -> LatentEncoder:
    """Four latents for the axes of a plane and their opposites: nothing is lost in the plane."""
    return LatentEncoder(
        W=torch.tensor([[1.0, 0, -1, 0, 0], [0, 1, 0, -1, 0], [0, 0, 0, 0, 0]]),
        b=torch.tensor([0, 0, 0, 0, -1.0]),
        theta=torch.zeros(5),
        k=None,
        input_norm="none",
        W_dec=torch.tensor([[1.0, 0, 0], [0, 1, 0], [-1, 0, 0], [0, -1, 0], [0, 0, 1]]),
        b_dec=torch.zeros(3),
        hook_point=POINT,
        model_name=None,
    )


def batch(x: list[list[float]], positions: list[int], kinds: list[int]) -> TokenBatch:
    lanes = torch.tensor(instance_of(range(len(x)), kinds))
    lanes[:, 1] = torch.tensor(positions, dtype=torch.int32)
    return TokenBatch(lanes, {POINT: torch.tensor(x)})


def known() -> Quality:
    """Two sequences: squared errors 4, 1, 1 and 0, in dimension 3."""
    special, content, role = Kind.SPECIAL, Kind.CONTENT, Kind.ROLE
    first = batch([[3, 0, 2], [1, 0, 1], [0, 1, -1.0]], [0, 1, 2], [special, role, content])
    return measure(plane(), [first, batch([[0, 2, 0.0]], [0], [special])])


def test_figures_of_a_known_sae() -> None:
    quality = known()
    assert (quality.num_tokens, quality.num_sequences) == (4, 2)
    x = torch.tensor([[3, 0, 2], [1, 0, 1], [0, 1, -1], [0, 2, 0.0]])
    assert quality.fvu == pytest.approx(6 / float((x - x.mean(0)).square().sum()))
    assert quality.l0 == 1.0
    assert quality.dead == pytest.approx(3 / 5)
    assert quality.dense == pytest.approx(2 / 5)


def test_errors_micro_and_macro_as_the_paper_has_them() -> None:
    parts = known().parts
    everything = parts["all"]
    assert everything.mse == pytest.approx(6 / 4 / 3)
    # The mean of the first sequence is 2, of the second 0.
    assert everything.mse_macro == pytest.approx((2 + 0) / 2 / 3)
    assert everything.log2_mse_macro == pytest.approx(math.log2(1 / 3))
    special = parts["special and role"]
    assert special.num_tokens == 3
    assert special.mse_macro == pytest.approx((2.5 + 0) / 2 / 3)
    assert parts["special"].mse_macro == pytest.approx((4 + 0) / 2 / 3)
    # A sequence without such a token has no say.
    assert parts["role"].mse_macro == pytest.approx(1 / 3)
    assert parts["content"].mse_macro == pytest.approx(1 / 3)


def test_parts_add_up() -> None:
    parts = known().parts
    assert parts["position 0"].num_tokens == 2
    assert parts["all but position 0"].num_tokens == 2
    assert "template" not in parts
    deciles = [part for name, part in parts.items() if name.startswith("norm decile")]
    assert sum(part.num_tokens for part in deciles) == 4
    norms = [part.mean_norm for part in deciles]
    assert norms == sorted(norms)
    assert parts["norm decile 10"].mean_norm == pytest.approx(math.sqrt(13))


def test_the_figures_can_be_written() -> None:
    values = json.loads(json.dumps(known().to_json()))
    assert values["parts"]["all"]["log2_mse"] == pytest.approx(math.log2(0.5))
    assert known().headline()["l0"] == values["l0"]


def instances(num: int, length: int | None = None) -> list[Lanes]:
    rng = np.random.default_rng(0)
    lengths = [length or n for n in rng.integers(2, 40, size=num)]
    return [
        instance_of(rng.integers(4, 300, size=n), conversation=i) for i, n in enumerate(lengths)
    ]


def test_several_saes_are_measured_from_one_forward_as_each_alone(
    tiny_lm: Path, make_tiny_sae, tmp_path: Path
) -> None:
    folders = {name: make_tiny_sae(tmp_path / name) for name in "ab"}
    config = json.loads((folders["b"] / "cfg.json").read_text())
    config["metadata"]["hook_name"] = "blocks.0.hook_resid_post"
    (folders["b"] / "cfg.json").write_text(json.dumps(config))
    encoders = {name: LatentEncoder.load(folder) for name, folder in folders.items()}
    model = LanguageModel.load(tiny_lm, [one.hook_point for one in encoders.values()])
    together = measure_saes(model, encoders, instances(20), tokens_per_forward=100)
    assert together["a"] != together["b"]
    for name, folder in folders.items():
        alone = measure_sae(tiny_lm, folder, instances(20))
        assert alone.fvu == pytest.approx(together[name].fvu, rel=1e-5)
        assert alone.l0 == pytest.approx(together[name].l0)


def perfect(d_in: int) -> LatentEncoder:
    eye = torch.eye(d_in)
    return LatentEncoder(
        W=torch.cat([eye, -eye], 1),
        b=torch.zeros(2 * d_in),
        theta=torch.zeros(2 * d_in),
        k=None,
        input_norm="none",
        W_dec=torch.cat([eye, -eye]),
        b_dec=torch.zeros(d_in),
        hook_point=POINT,
        model_name=None,
    )


@pytest.mark.parametrize(
    "site", ["hook_resid_post", "hook_resid_pre", "hook_mlp_out", "hook_attn_out", "attn.hook_z"]
)
def test_a_perfect_sae_costs_nothing_wherever_it_is(any_tiny_lm: Path, site: str) -> None:
    encoder = perfect(32)
    encoder.hook_point = HookPoint.parse(f"blocks.1.{site}")
    cost = recovered(WholeModel.load(any_tiny_lm), {"one": encoder}, [instances(4), instances(3)])[
        "one"
    ]
    assert cost.ce_spliced == pytest.approx(cost.ce, abs=1e-5)
    assert cost.kl == pytest.approx(0, abs=1e-5)
    assert cost.kl_zero > 1e-3
    assert (cost.ce_recovered, cost.kl_recovered) == (
        pytest.approx(1, 0.01),
        pytest.approx(1, 0.01),
    )
    assert cost.num_tokens == sum(map(len, instances(4) + instances(3)))


def test_padding_does_not_enter_the_losses(tiny_lm: Path, tiny_sae: Path) -> None:
    model, encoder = WholeModel.load(tiny_lm), LatentEncoder.load(tiny_sae)
    together = recovered(model, {"one": encoder}, [instances(6)])["one"]
    alone = recovered(model, {"one": encoder}, [[one] for one in instances(6)])["one"]
    for name in ("ce", "ce_spliced", "ce_zero", "kl", "kl_zero"):
        assert getattr(together, name) == pytest.approx(getattr(alone, name), rel=1e-4)


@pytest.mark.slow  # sae-lens takes 8 s to import
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_sae_lens_evals_agree_where_both_have_the_figure(tiny_lm: Path, tiny_sae: Path) -> None:
    from sae_lens import SAE  # noqa: PLC0415
    from sae_lens.evals import get_eval_everything_config, run_evals  # noqa: PLC0415
    from sae_lens.load_model import load_model  # noqa: PLC0415
    from sae_lens.training.activation_scaler import ActivationScaler  # noqa: PLC0415

    rows = instances(12, length=16)
    ids = torch.stack([torch.from_numpy(one[:, 2]).long() for one in rows])

    class Store:
        """Gives out the rows, four at a time; sae-lens' own reads a dataset that must be named."""

        store_batch_size_prompts, context_size = 4, 16

        def __init__(self) -> None:
            self.reset_input_dataset()

        def reset_input_dataset(self) -> None:
            self.rows = iter(ids)

        def get_batch_tokens(self, num: int) -> torch.Tensor:
            return torch.stack([next(self.rows) for _ in range(num)])

    sae = SAE.load_from_disk(tiny_sae)
    sae.cfg.metadata.hook_name = "model.layers.1"
    theirs, features = run_evals(
        sae,
        Store(),  # pyright: ignore[reportArgumentType]
        load_model("AutoModelForCausalLM", str(tiny_lm), "cpu"),
        ActivationScaler(),
        get_eval_everything_config(4, 3, 3),
        exclude_special_tokens=False,
    )
    ours = measure_sae(tiny_lm, tiny_sae, rows, splice=True)
    assert ours.recovered is not None
    quality, ce = theirs["reconstruction_quality"], theirs["model_performance_preservation"]
    kl = theirs["model_behavior_preservation"]
    density = np.array(features["feature_density"])
    pairs: dict[str, tuple[float, Any]] = {
        "l0": (ours.l0, theirs["sparsity"]["l0"]),
        "fvu": (1 - ours.fvu, quality["explained_variance"]),
        "mse": (ours.parts["all"].mse * 32, quality["mse"]),
        "ce": (ours.recovered.ce, ce["ce_loss_without_sae"]),
        "ce spliced": (ours.recovered.ce_spliced, ce["ce_loss_with_sae"]),
        "ce zero": (ours.recovered.ce_zero, ce["ce_loss_with_ablation"]),
        "ce recovered": (ours.recovered.ce_recovered, ce["ce_loss_score"]),
        "kl": (ours.recovered.kl, kl["kl_div_with_sae"]),
        "kl zero": (ours.recovered.kl_zero, kl["kl_div_with_ablation"]),
        "kl recovered": (ours.recovered.kl_recovered, kl["kl_div_score"]),
        "dead": (ours.dead, float((density == 0).mean())),
        "dense": (ours.dense, float((density > 0.1).mean())),
    }
    for name, (mine, other) in pairs.items():
        assert mine == pytest.approx(other, rel=2e-3, abs=1e-4), name
