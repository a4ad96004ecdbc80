"""A subspace on a model: it changes nothing at first, stays where it is, and is a plain LoRA."""

import copy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from sae_ray.adapters.attach import AdapterSpec, attach, hold_again
from sae_ray.adapters.basis import Basis
from sae_ray.adapters.subspace import Subspace, lora_layers
from sae_ray.errors import ArtifactError, ModelError
from sae_ray.lm import HookPoint

IDS = torch.randint(5, 300, (3, 24), generator=torch.Generator().manual_seed(0))
MODES = ("freeze", "init", "core", "soft")


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(IDS).logits


@pytest.fixture
def subspace(tmp_path: Path):
    """Saves a random subspace of rank 4 at a hook point."""

    def save(hook_point: str = "blocks.1.hook_resid_post", r: int = 4, seed: int = 0) -> str:
        generator = torch.Generator().manual_seed(seed)
        U = torch.linalg.qr(torch.randn(32, r, generator=generator))[0]
        basis = Basis(U, torch.ones(r), torch.eye(r), torch.arange(r), 0.0)
        facts = {"hook_point": hook_point, "coherence": 0.0}
        folder = tmp_path / f"subspace-{hook_point}-{r}-{seed}"
        Subspace(basis, HookPoint.parse(hook_point), facts).save(folder)
        return str(folder)

    return save


def spec_of(*folders: str, **settings) -> AdapterSpec:
    return AdapterSpec(kind="subspace", subspaces=folders, **settings)


def trained(adapted: PeftModel, steps: int = 20, lr: float = 1e-2) -> PeftModel:
    adapted.train()
    chosen = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(chosen, lr=lr)
    for _ in range(steps):
        adapted(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return adapted.eval()


def inside(adapted: PeftModel, folder: str, sides=("writers", "readers")) -> dict[str, float]:
    """Share of each matrix's update that lies in the span, behind the norm's gain or before it."""
    space = Subspace.load(folder)
    shares = {}
    for place, layer in lora_layers(adapted, space, sides):
        delta = layer.get_delta_weight("default").detach().float()  # pyright: ignore[reportAttributeAccessIssue]
        delta = delta if isinstance(layer.get_base_layer(), nn.Linear) else delta.T
        delta = delta if place.side == "writers" else delta.T
        if place.norm is not None:
            norm = adapted.get_base_model().get_submodule(place.norm)
            gain = norm.weight.detach() + ("Gemma" in type(norm).__name__)  # pyright: ignore[reportCallIssue]
            delta = gain[:, None] * delta
        U = space.basis.U
        shares[place.path] = float((U.T @ delta).square().sum() / delta.square().sum())
    return shares


@pytest.mark.parametrize("mode", MODES)
def test_a_new_one_changes_no_bit_in_any_family(mode, any_tiny_lm, whole, subspace):
    for side in (("writers",), ("readers",), ("writers", "readers")):
        model = whole(any_tiny_lm)
        base = logits(model)
        adapted = attach(model, spec_of(subspace(), mode=mode, sides=side)).eval()
        assert (logits(adapted) - base).abs().max() == 0.0, side
        trained(adapted, 3)
        assert (logits(adapted) - base).abs().max() > 1e-4, side
        with adapted.disable_adapter():
            assert torch.equal(logits(adapted), base)
        assert torch.equal(logits(adapted.unload()), base)


def frozen_factors(adapted: PeftModel, folder: str) -> list[nn.Parameter]:
    pairs = lora_layers(adapted, Subspace.load(folder), ("writers", "readers"))
    return [  # pyright: ignore[reportReturnType]
        (layer.lora_B if place.side == "writers" else layer.lora_A)["default"].weight
        for place, layer in pairs
    ]


def test_a_frozen_factor_stays_as_it_is_through_everything(tmp_path, tiny_lm, whole, subspace):
    folder = subspace()
    spec = spec_of(folder)
    adapted = attach(whole(tiny_lm), spec)
    before = [factor.detach().clone() for factor in frozen_factors(adapted, folder)]

    def check(model: PeftModel) -> None:
        factors = frozen_factors(model, folder)
        assert not any(factor.requires_grad for factor in factors)
        assert all(map(torch.equal, factors, before))

    check(trained(adapted))
    adapted.set_adapter("default")
    check(trained(adapted, 3))
    with adapted.disable_adapter():
        logits(adapted)
    check(trained(adapted, 3))
    adapted.add_adapter("ref", adapted.peft_config["default"])
    adapted.set_adapter("ref")
    adapted.set_adapter("default")
    check(trained(adapted, 3))
    check(trained(copy.deepcopy(adapted), 3))
    adapted.save_pretrained(tmp_path / "a", selected_adapters=["default"])
    again = PeftModel.from_pretrained(whole(tiny_lm), tmp_path / "a", is_trainable=True)
    assert any(factor.requires_grad for factor in frozen_factors(again, folder)), "PEFT's own"
    hold_again(again, spec)
    check(trained(again, 3))
    again.load_adapter(tmp_path / "a", "default", is_trainable=True)
    check(trained(again, 3))


def test_what_is_saved_is_a_plain_lora(tmp_path, tiny_lm, whole, subspace):
    for mode in MODES:
        adapted = trained(attach(whole(tiny_lm), spec_of(subspace(), mode=mode)), 5)
        adapted.save_pretrained(tmp_path / mode)
        torch.save(logits(adapted), tmp_path / mode / "expected.pt")
    code = f"""
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
for mode in {MODES}:
    folder = {str(tmp_path)!r} + "/" + mode
    base = AutoModelForCausalLM.from_pretrained({str(tiny_lm)!r}, attn_implementation="eager")
    model = PeftModel.from_pretrained(base, folder).eval()
    ids, expected = torch.tensor({IDS.tolist()}), torch.load(folder + "/expected.pt")
    with torch.no_grad():
        found = model(ids).logits
        merged = model.merge_and_unload()(ids).logits
    assert (found - expected).abs().max() <= 0.0, mode
    assert (merged - expected).abs().max() < 1e-4, mode
assert not [name for name in sys.modules if name.startswith("sae_ray")]
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(("family", "least"), [("llama", 1 - 1e-6), ("gpt2", 1 - 1e-6)])
def test_the_update_stays_in_the_span(family, least, tiny_lm_of, whole, subspace):
    folder = subspace()
    for mode in ("freeze", "core"):
        adapted = trained(attach(whole(tiny_lm_of(family)), spec_of(folder, mode=mode)))
        assert min(inside(adapted, folder).values()) > least, mode
    free = inside(trained(attach(whole(tiny_lm_of(family)), spec_of(folder, mode="init"))), folder)
    drawn = spec_of(folder, mode="soft", soft_weight=10.0)
    soft = inside(trained(attach(whole(tiny_lm_of(family)), drawn)), folder)
    assert min(free.values()) < 0.98
    assert np.mean(list(soft.values())) > np.mean(list(free.values()))


def stream_share(model, adapted: PeftModel, folder: str) -> float:
    """Share of the change of the stream behind the layer that lies in the span."""
    U = Subspace.load(folder).basis.U
    with torch.no_grad():
        with adapted.disable_adapter():
            before = adapted(IDS, output_hidden_states=True).hidden_states[2]
        change = adapted(IDS, output_hidden_states=True).hidden_states[2] - before
    return float((change @ U).square().sum() / change.square().sum())


def test_post_norms_bend_the_span_and_folding_their_gain_helps(
    tiny_lm_of, whole, subspace, monkeypatch
):
    # Of the MLP alone: what attention adds goes through the MLP, and out of the span, by itself.
    folder = subspace("blocks.1.hook_mlp_out")
    spec = spec_of(folder)

    def share(family: str) -> float:
        model = whole(tiny_lm_of(family))
        generator = torch.Generator().manual_seed(3)
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
        return stream_share(model, trained(attach(model, spec), 5, 1e-3), folder)

    assert share("llama") > 0.999
    folded = share("gemma2")
    monkeypatch.setattr(
        "sae_ray.adapters.subspace.gentle_inverse", lambda gains: torch.ones_like(gains)
    )
    assert 0.999 > folded > share("gemma2") > 0.2


def test_each_subspace_has_its_own_rank_and_its_own_matrices(tiny_lm, whole, subspace):
    a, b = subspace("blocks.0.hook_resid_post", 4), subspace("blocks.1.hook_resid_post", 2)
    adapted = attach(whole(tiny_lm), spec_of(a, b, sides=("writers",)))
    shapes = {n: tuple(p.shape) for n, p in adapted.named_parameters() if "lora_B" in n}
    assert sorted(shapes.values()) == [(32, 2), (32, 2), (32, 4), (32, 4)]
    for folder in (a, b):
        for _, layer in lora_layers(adapted, Subspace.load(folder), ("writers",)):
            assert layer.scaling["default"] == 1.0
            torch.testing.assert_close(
                layer.lora_B["default"].weight, Subspace.load(folder).basis.U
            )


def test_parameters_are_counted_by_formula(tiny_lm, whole, subspace):
    folder = subspace()
    # Writers: r x in; readers: out x r. Width 32, heads 4 x 8, keys 2 x 8, MLP 64.
    counts = {"freeze": 4 * (32 + 64) + 4 * (32 + 16 + 16 + 64 + 64), "core": 7 * 16}
    for mode, count in counts.items():
        adapted = attach(whole(tiny_lm), spec_of(folder, mode=mode))
        assert adapted.get_nb_trainable_parameters()[0] == count


def test_a_bf16_model_keeps_the_basis_in_fp32(tiny_lm, whole, subspace):
    model = whole(tiny_lm, torch.bfloat16)
    base = logits(model)
    adapted = attach(model, spec_of(subspace())).eval()
    assert torch.equal(logits(adapted), base)
    assert {p.dtype for n, p in adapted.named_parameters() if "lora" in n} == {torch.float32}


def test_what_cannot_be_placed_is_refused(tmp_path, tiny_lm, whole, subspace):
    with pytest.raises(ModelError, match="of the residual stream"):
        attach(whole(tiny_lm), spec_of(subspace("blocks.1.attn.hook_z")))
    both = subspace("blocks.1.hook_resid_post"), subspace("blocks.1.hook_mlp_out")
    with pytest.raises(ModelError, match="two subspaces are put on"):
        attach(whole(tiny_lm), spec_of(*both))
    with pytest.raises(ArtifactError, match="no subspace at"):
        attach(whole(tiny_lm), spec_of(str(tmp_path / "nowhere")))
