"""Latent adapters: a new one changes nothing, a trained one does what SAE plus error would."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import jaxtyping
import peft
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

from sae_ray.adapters.attach import AdapterSpec, attach, share_penalties
from sae_ray.adapters.edits import LATENT_KINDS, num_parameters
from sae_ray.adapters.latent import NAME
from sae_ray.errors import ModelError
from sae_ray.lm import HookPoint, family_of, visiting
from sae_ray.sae.encoder import LatentEncoder
from sae_ray.sae.pretrained import load_encoder

IDS = torch.randint(5, 300, (3, 24), generator=torch.Generator().manual_seed(0))
SITES = ("hook_resid_pre", "hook_resid_post", "hook_mlp_out", "hook_attn_out", "attn.hook_z")


@torch.no_grad()
def logits(model: nn.Module, **inputs) -> Tensor:
    return model(**({"input_ids": IDS} | inputs)).logits


@torch.no_grad()
def shake(model: nn.Module, scale: float = 0.3, name: str = ".default.") -> None:
    """Give trainable parameters values, as training would."""
    generator = torch.Generator().manual_seed(1)
    for key, parameter in model.named_parameters():
        if "latent_edit" in key and name in key:
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))


def layers(model: PeftModel) -> list:
    return [layer for _, _, layer in model.base_model.layers()]  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize("kind", LATENT_KINDS)
def test_a_new_adapter_changes_no_bit_at_any_site_of_any_family(kind, any_tiny_lm, whole, sae_at):
    model = whole(any_tiny_lm)
    base = logits(model)
    for site in SITES:
        for layer in (0, 1) if site == "hook_resid_pre" else (1,):
            spec = AdapterSpec(kind=kind, sae=(sae_at(f"blocks.{layer}.{site}"),))
            adapted = attach(model, spec)
            assert (logits(adapted) - base).abs().max() == 0.0, (site, layer)
            shake(adapted)
            changed = logits(adapted)
            assert (changed - base).abs().max() > 1e-3, (site, layer)
            with adapted.disable_adapter():
                assert torch.equal(logits(adapted), base)
            assert torch.equal(logits(adapted), changed)
            model = adapted.unload()
            assert torch.equal(logits(model), base)
            assert not [n for n, _ in model.named_modules() if "sae_" in n]


def explicit(encoder: LatentEncoder, kind: str, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    """SAE plus error, spelt out: decode(g(z)) + (x - decode(z)), with gradients everywhere."""
    z = encoder.encode(x)
    if kind == "residual":
        units = (z @ parameters["down"].T + parameters["down_bias"]).relu()
        g = z + units @ parameters["up"].T + parameters["up_bias"]
    else:
        g = z + parameters.get("scale", 0.0) * z + parameters.get("steering", 0.0)
    return encoder.decode(g, x) + (x - encoder.decode(z, x))


@pytest.mark.parametrize("norm", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("kind", LATENT_KINDS)
def test_gradients_are_those_of_sae_plus_error_at_two_sites(kind, norm, tiny_lm, whole, sae_at):
    names = ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post")
    saes = tuple(sae_at(name, seed) for seed, name in enumerate(names))
    for sae in saes:
        config = json.loads((Path(sae) / "cfg.json").read_text())
        config["normalize_activations"] = norm
        (Path(sae) / "cfg.json").write_text(json.dumps(config))
    model = whole(tiny_lm)
    adapted = attach(model, AdapterSpec(kind=kind, sae=saes, **_hidden(kind, 5)))
    shake(adapted, 0.1)
    loss = adapted(IDS, labels=IDS).loss
    loss.backward()
    found = {n: p.grad for n, p in adapted.named_parameters() if p.requires_grad}

    clean = whole(tiny_lm)
    own: dict[str, Tensor] = {}
    with torch.enable_grad():
        stack = []
        for sae, name in zip(saes, names, strict=True):
            point = HookPoint.parse(name)
            prefix = f"base_model.model.model.layers.{point.layer}.sae_out.latent_edit.default."
            values = {
                key.removeprefix(prefix): value.detach().clone().requires_grad_()
                for key, value in adapted.named_parameters()
                if key.startswith(prefix)
            }
            own |= {prefix + key: value for key, value in values.items()}
            encoder = load_encoder(sae)
            visit = lambda x, e=encoder, v=values: explicit(e, kind, v, x)  # noqa: E731
            stack.append(visiting(clean.base_model, family_of(clean.config), point, visit))
        for one in stack:
            one.__enter__()
        expected = clean(IDS, labels=IDS).loss
        expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert found.keys() == own.keys()
    for key, value in own.items():
        scale = value.grad.abs().max()  # pyright: ignore[reportOptionalMemberAccess]
        assert (found[key] - value.grad).abs().max() <= 1e-6 + 1e-5 * scale, key  # pyright: ignore[reportOperatorIssue]


def _hidden(kind: str, hidden: int) -> dict:
    return {"hidden": hidden} if kind == "residual" else {}


@pytest.mark.parametrize("kind", LATENT_KINDS)
@pytest.mark.parametrize("latents", [None, (3, 17, 40)])
def test_parameters_are_counted_by_formula_and_alone_saved(
    kind, latents, tmp_path, tiny_lm, whole, sae_at
):
    sae = sae_at("blocks.1.hook_resid_post")
    spec = AdapterSpec(kind=kind, sae=(sae,), latents=latents, **_hidden(kind, 7))
    adapted = attach(whole(tiny_lm), spec)
    num = num_parameters(kind, 64 if latents is None else 3, 7)
    assert adapted.get_nb_trainable_parameters()[0] == num
    shake(adapted)
    expected = logits(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in saved.values()) == num
    assert not [key for key in saved if "default" in key]
    again = PeftModel.from_pretrained(whole(tiny_lm), tmp_path / "adapter", adapter_name="b")
    assert torch.equal(logits(again.eval()), expected)


def test_a_latent_set_leaves_the_others_alone(tiny_lm, whole, sae_at):
    sae = sae_at("blocks.1.hook_resid_post")
    model = whole(tiny_lm)
    chosen = (3, 17, 40)
    few = attach(model, AdapterSpec(kind="scale", sae=(sae,), latents=chosen))
    shake(few)
    values = layers(few)[0].edit("default").scale.detach().clone()
    expected = logits(few)
    model = few.unload()
    whole_set = attach(model, AdapterSpec(kind="scale", sae=(sae,)))
    with torch.no_grad():
        layers(whole_set)[0].edit("default").scale[list(chosen)] = values
    torch.testing.assert_close(logits(whole_set), expected, rtol=1e-5, atol=1e-5)


def test_a_residual_edit_is_no_linear_map(tiny_lm, whole, sae_at):
    sae = sae_at("blocks.1.hook_resid_post")
    edit = layers(attach(whole(tiny_lm), AdapterSpec(kind="residual", sae=(sae,))))[0].edit(
        "default"
    )
    with torch.no_grad():
        edit.up.normal_()
        z = torch.randn(2, 9, 64)
        units = lambda z: (z @ edit.down.T).relu() @ edit.up.T  # noqa: E731
        x = torch.randn(1, 5, 32)
        assert not torch.allclose(edit(2 * x, None), 2 * edit(x, None), atol=1e-2)
        assert not torch.allclose(units(-z), -units(z), atol=1e-2)


def test_steering_is_one_vector_and_what_the_decoder_cannot_see_changes_nothing(
    tiny_lm, whole, sae_at
):
    sae = sae_at("blocks.1.hook_resid_post")
    model = whole(tiny_lm)
    adapted = attach(model, AdapterSpec(kind="steering", sae=(sae,)))
    shake(adapted)
    edit = layers(adapted)[0].edit("default")
    expected = logits(adapted)
    W_dec = load_encoder(sae).W_dec
    v = edit.steering.detach() @ W_dec
    with torch.no_grad():
        null = torch.linalg.svd(W_dec.T)[2][-1]
        edit.steering += 10 * null
    torch.testing.assert_close(logits(adapted), expected, rtol=1e-4, atol=1e-4)
    clean = adapted.unload()
    point = HookPoint.parse("blocks.1.hook_resid_post")
    with visiting(clean.base_model, family_of(clean.config), point, lambda x: x + v):
        torch.testing.assert_close(logits(clean), expected, rtol=1e-5, atol=1e-5)


def test_adapters_are_switched_added_and_deleted_as_peft_users_expect(
    tmp_path, tiny_lm, whole, sae_at
):
    post, pre = sae_at("blocks.0.hook_resid_post"), sae_at("blocks.0.hook_resid_pre")
    model = whole(tiny_lm)
    base = logits(model)
    a = AdapterSpec(kind="steering", sae=(post,))
    b = AdapterSpec(kind="affine", sae=(pre,))
    adapted = attach(model, a)
    attach(adapted, b, name="b").eval()
    shake(adapted)
    shake(adapted, name=".b.")
    assert adapted.active_adapters == ["default"]
    only_a = logits(adapted)
    trainable = {n for n, p in adapted.named_parameters() if p.requires_grad}
    assert trainable == {n for n, _ in adapted.named_parameters() if ".default." in n}
    adapted.set_adapter("b")
    only_b = logits(adapted)
    adapted.base_model.set_adapter(["default", "b"])  # pyright: ignore[reportCallIssue]
    both = logits(adapted)
    assert len({tuple(one.flatten()[:9].tolist()) for one in (base, only_a, only_b, both)}) == 4
    rows = logits(adapted, adapter_names=["default", "b", "__base__"])
    for row, alone in enumerate((only_a, only_b, base)):
        torch.testing.assert_close(rows[row], alone[row], rtol=1e-4, atol=1e-5)
    with pytest.raises(ModelError, match="there are default, b"):
        logits(adapted, adapter_names=["default", "c", "b"])
    adapted.set_adapter("b")
    adapted.save_pretrained(tmp_path, selected_adapters=["b"])
    adapted.set_adapter("default")
    adapted.delete_adapter("b")
    assert torch.equal(logits(adapted), only_a)
    adapted.load_adapter(tmp_path / "b", "again")
    adapted.set_adapter("again")
    assert torch.equal(logits(adapted), only_b)
    assert torch.equal(logits(copy.deepcopy(adapted)), only_b)
    assert torch.equal(logits(copy.deepcopy(adapted).unload()), base)


def test_two_sites_of_one_layer_do_not_hide_one_another_from_a_second_adapter(
    tiny_lm, whole, sae_at
):
    saes = (sae_at("blocks.1.hook_resid_post"), sae_at("blocks.1.attn.hook_z"))
    spec = AdapterSpec(kind="steering", sae=saes)
    adapted = attach(whole(tiny_lm), spec)
    adapted.add_adapter("ref", adapted.peft_config["default"])
    for layer in layers(adapted):
        assert set(layer.latent_edit) == {"default", "ref"}
        assert layer.edit("default").sae is layer.edit("ref").sae


@pytest.mark.parametrize("family", ["gpt_neox", "gpt2"])
@pytest.mark.parametrize("site", SITES)
def test_steering_merges_exactly_where_a_bias_takes_it(family, site, tiny_lm_of, whole, sae_at):
    model = whole(tiny_lm_of(family))
    base = logits(model)
    adapted = attach(model, AdapterSpec(kind="steering", sae=(sae_at(f"blocks.1.{site}"),)))
    shake(adapted)
    expected = logits(adapted)
    adapted.merge_adapter()
    torch.testing.assert_close(logits(adapted), expected, rtol=1e-4, atol=2e-5)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), base)
    assert torch.equal(logits(adapted), expected)
    adapted.merge_adapter()
    adapted.unmerge_adapter()
    assert torch.equal(logits(adapted), expected)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=2e-5)
    assert not [n for n, _ in merged.named_modules() if "sae_" in n]


@pytest.mark.parametrize(
    ("family", "hook", "settings", "why"),
    [
        ("llama", "blocks.1.hook_resid_post", {"kind": "steering"}, "has no bias"),
        ("gemma2", "blocks.1.hook_resid_post", {"kind": "steering"}, "has no bias"),
        ("gpt2", "blocks.0.hook_resid_pre", {"kind": "steering"}, "embedding"),
        ("gpt2", "blocks.1.hook_resid_post", {"kind": "scale"}, "each token activates"),
        (
            "gpt2",
            "blocks.1.hook_resid_post",
            {"kind": "steering", "positions": "non_bos"},
            "every token",
        ),
    ],
)
def test_a_merge_that_would_not_be_exact_is_refused(
    family, hook, settings, why, tiny_lm_of, whole, sae_at
):
    adapted = attach(whole(tiny_lm_of(family)), AdapterSpec(sae=(sae_at(hook),), **settings))
    shake(adapted)
    before = logits(adapted)
    with pytest.raises(ModelError, match=why):
        adapted.merge_and_unload()
    assert torch.equal(logits(adapted), before)


@pytest.mark.parametrize("kind", LATENT_KINDS)
@pytest.mark.parametrize("positions", ["all", "non_bos", "completion"])
def test_generation_is_the_same_with_and_without_a_cache(kind, positions, tiny_lm, whole, sae_at):
    spec = AdapterSpec(kind=kind, sae=(sae_at("blocks.1.hook_resid_post"),), positions=positions)
    adapted = attach(whole(tiny_lm), spec).eval()
    shake(adapted)
    prompt = {"input_ids": IDS[:2, :8], "attention_mask": torch.ones(2, 8, dtype=torch.long)}
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    with_cache = adapted.generate(**prompt, **settings)
    if positions == "completion":
        with pytest.raises(ModelError, match="use_cache=True"):
            adapted.generate(**prompt, **settings, use_cache=False)
        labels = with_cache.clone()
        labels[:, :8] = -100
        again = logits(adapted, input_ids=with_cache, labels=labels)[:, 7:-1].argmax(-1)
        assert torch.equal(again, with_cache[:, 8:])
    else:
        without = adapted.generate(**prompt, **settings, use_cache=False)
        assert torch.equal(with_cache, without)


def test_completions_are_where_labels_are_and_the_first_token_is_left_out(tiny_lm, whole, sae_at):
    sae = sae_at("blocks.0.hook_resid_pre")
    model = whole(tiny_lm)
    point, family = HookPoint(0, "resid_pre"), family_of(model.config)
    seen: dict[str, Tensor] = {}
    with visiting(model.base_model, family, point, lambda x: seen.setdefault("base", x)):
        logits(model)
    labels = IDS.clone()
    labels[:, :10] = -100
    packed = torch.cat([torch.arange(9), torch.arange(15)]).expand(3, -1)
    padded = (torch.arange(24) >= torch.tensor([0, 3, 5])[:, None]).long()
    cases = [
        ("completion", {"labels": labels}, labels != -100),
        ("non_bos", {}, (torch.arange(24) > 0).expand(3, -1)),
        ("non_bos", {"position_ids": packed}, packed > 0),
        (
            "non_bos",
            {"attention_mask": padded},
            torch.arange(24) != torch.tensor([0, 3, 5])[:, None],
        ),
    ]
    for positions, inputs, expected in cases:
        adapted = attach(model, AdapterSpec(kind="steering", sae=(sae,), positions=positions))
        shake(adapted)
        seen.pop("edited", None)
        with visiting(model.base_model, family, point, lambda x: seen.setdefault("edited", x)):
            logits(adapted, **inputs)
        assert torch.equal((seen["edited"] != seen["base"]).any(-1), expected), positions
        model = adapted.unload()
    adapted = attach(model, AdapterSpec(kind="steering", sae=(sae,), positions="completion"))
    with pytest.raises(ModelError, match="pass labels"):
        logits(adapted)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", LATENT_KINDS)
def test_gradients_are_the_same_with_gradient_checkpointing(
    reentrant, kind, tiny_lm, whole, sae_at
):
    saes = (sae_at("blocks.0.hook_resid_post"), sae_at("blocks.1.hook_mlp_out"))
    spec = AdapterSpec(kind=kind, sae=saes, positions="non_bos", l1=0.1, edit_penalty=0.5)
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        adapted = attach(whole(tiny_lm), spec).train()
        shake(adapted, 0.1)
        if checkpointing:
            adapted.enable_input_require_grads()
            settings = {"use_reentrant": reentrant}
            adapted.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
        adapted(IDS, labels=IDS, use_cache=False).loss.backward()
        gradients.append([p.grad for p in adapted.parameters() if p.requires_grad])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", LATENT_KINDS)
def test_penalties_add_their_own_gradients(kind, tiny_lm, whole, sae_at):
    sae = sae_at("blocks.1.hook_resid_post")

    def gradients(passes=1, **settings):
        torch.manual_seed(0)
        adapted = attach(whole(tiny_lm), AdapterSpec(kind=kind, sae=(sae,), **settings))
        share_penalties(adapted, passes)
        shake(adapted)
        adapted(IDS, labels=IDS).loss.backward()
        edit = layers(adapted)[0].edit("default")
        return {n: p.grad for n, p in edit.named_parameters()}, edit, adapted

    plain, edit, adapted = gradients()
    norms = load_encoder(sae).W_dec.norm(dim=-1)
    parameters = dict(edit.named_parameters())
    shrunk = sum(
        (parameters[n].abs() * (norms if parameters[n].ndim == 1 else norms[:, None])).sum()
        for n in parameters.keys() & {"steering", "scale", "up", "up_bias"}
    )
    expected = torch.autograd.grad(shrunk, list(parameters.values()), allow_unused=True)  # pyright: ignore[reportArgumentType, reportCallIssue]
    for (name, before), extra in zip(plain.items(), expected, strict=True):
        after = gradients(l1=0.3)[0][name]
        extra = 0 if extra is None else 0.3 * extra
        torch.testing.assert_close(after, before + extra, rtol=1e-5, atol=1e-6)

    twice = gradients(l1=0.3, passes=2)[0]
    once = gradients(l1=0.15)[0]
    assert all(torch.equal(twice[name], once[name]) for name in plain)

    seen: dict[str, Tensor] = {}
    point, model = HookPoint(1, "resid_post"), adapted.get_base_model()
    with adapted.disable_adapter(), torch.no_grad():
        visit = lambda x: seen.setdefault("x", x)  # noqa: E731
        with visiting(model.base_model, family_of(model.config), point, visit):  # pyright: ignore[reportArgumentType]
            adapted(IDS)
    x = seen["x"]
    ratio = edit(x, None).expand_as(x).square().sum() / x.square().sum()
    expected = torch.autograd.grad(ratio, list(parameters.values()))
    after = gradients(edit_penalty=0.7)[0]
    for (name, before), extra in zip(plain.items(), expected, strict=True):
        torch.testing.assert_close(after[name], before + 0.7 * extra, rtol=1e-4, atol=1e-5)


def test_a_bf16_model_keeps_the_edit_in_fp32(tiny_lm, whole, sae_at):
    sae = sae_at("blocks.1.hook_resid_post")
    for kind in LATENT_KINDS:
        model = whole(tiny_lm, torch.bfloat16)
        base = logits(model)
        adapted = attach(model, AdapterSpec(kind=kind, sae=(sae,)))
        assert torch.equal(logits(adapted), base)
        edit = layers(adapted.bfloat16())[0].edit("default")
        assert edit.sae.W_dec.dtype == torch.float32
        shake(adapted)
        assert logits(adapted).dtype == torch.bfloat16
        assert edit(torch.randn(1, 3, 32).bfloat16(), None).dtype == torch.float32


def test_an_adapter_names_the_module_to_import_where_it_is_not_known(
    tmp_path, tiny_lm, whole, sae_at
):
    adapted = attach(
        whole(tiny_lm), AdapterSpec(kind="steering", sae=(sae_at("blocks.1.hook_resid_post"),))
    )
    shake(adapted)
    adapted.save_pretrained(tmp_path / "a")
    torch.save(logits(adapted), tmp_path / "expected.pt")
    code = f"""
import sys, torch
from peft import PeftModel, AutoPeftModelForCausalLM
if sys.argv[1:]:
    import {NAME}
model = AutoPeftModelForCausalLM.from_pretrained({str(tmp_path / "a")!r}, dtype=torch.float32,
    attn_implementation="eager").eval()
with torch.no_grad():
    found = model(torch.tensor({IDS.tolist()})).logits
assert torch.equal(found, torch.load({str(tmp_path / "expected.pt")!r})), "other logits"
"""
    run = lambda *a: subprocess.run(  # noqa: E731
        [sys.executable, "-c", code, *a], capture_output=True, text=True, cwd=Path.cwd()
    )
    assert NAME.upper() in run().stderr.splitlines()[-1]
    known = run("import")
    assert known.returncode == 0, known.stderr


def test_another_sae_in_the_place_of_the_adapters_own_is_refused(tmp_path, tiny_lm, whole, sae_at):
    hook = "blocks.1.hook_resid_post"
    sae = sae_at(hook)
    attach(whole(tiny_lm), AdapterSpec(kind="scale", sae=(sae,))).save_pretrained(tmp_path / "a")
    weights = Path(sae) / "sae_weights.safetensors"
    weights.write_bytes((Path(sae_at(hook, 5)) / weights.name).read_bytes())
    with pytest.raises(ModelError, match="is not the one that the adapter was made on"):
        PeftModel.from_pretrained(whole(tiny_lm), tmp_path / "a")


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ({"hook_points": ("blocks.0.hook_resid_post",)}, "reads blocks.1.hook_resid_post"),
        ({"hook_points": ("blocks.9.hook_resid_post",)}, "has layers 0 to 2"),
        ({"latents": (3, 64)}, "has 0 to 63"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(spec, why, tiny_lm, whole, sae_at):
    sae = sae_at("blocks.1.hook_resid_post")
    with pytest.raises(ModelError, match=why):
        attach(whole(tiny_lm), AdapterSpec(kind="scale", sae=(sae,), **spec))


def test_the_same_activations_by_two_names_are_refused(tiny_lm, whole, sae_at):
    saes = (sae_at("blocks.0.hook_resid_post"), sae_at("blocks.1.hook_resid_pre"))
    with pytest.raises(ModelError, match="same activations"):
        attach(whole(tiny_lm), AdapterSpec(kind="scale", sae=saes))


def test_recorded_hidden_states_are_those_that_the_next_layer_reads(tiny_lm, whole, sae_at):
    model = whole(tiny_lm)
    adapted = attach(model, AdapterSpec(kind="steering", sae=(sae_at("blocks.0.hook_resid_post"),)))
    shake(adapted)
    seen: dict[str, Tensor] = {}
    point = HookPoint(1, "resid_pre")
    visit = lambda x: seen.setdefault("x", x)  # noqa: E731
    with visiting(model.base_model, family_of(model.config), point, visit), torch.no_grad():
        states = adapted(IDS, output_hidden_states=True).hidden_states
    assert torch.equal(states[1], seen["x"])


@pytest.fixture
def unchecked_shapes():
    """Shapes are not checked while torch traces: what it traces with is no tensor to jaxtyping."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked_shapes")
def test_compiled_and_disabled_is_the_base(tiny_lm, whole, sae_at):
    model = whole(tiny_lm)
    base = logits(model)
    adapted = attach(model, AdapterSpec(kind="affine", sae=(sae_at("blocks.1.hook_resid_post"),)))
    shake(adapted)
    expected = logits(adapted)
    compiled = torch.compile(adapted, backend="eager")
    torch.testing.assert_close(logits(compiled), expected, rtol=1e-5, atol=1e-5)  # pyright: ignore[reportArgumentType]
    with adapted.disable_adapter():
        torch.testing.assert_close(logits(compiled), base, rtol=1e-5, atol=1e-5)  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(logits(compiled), expected, rtol=1e-5, atol=1e-5)  # pyright: ignore[reportArgumentType]


def test_peft_knows_the_method():
    assert peft.PeftType(NAME.upper()).value == NAME.upper()
