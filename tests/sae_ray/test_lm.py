"""What is read below a hook point is what the whole model holds there, for every family."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    PreTrainedModel,
)

from sae_ray.errors import ModelError
from sae_ray.lm import FAMILIES, HookPoint, LanguageModel, load_config, width_at

SEQUENTIAL = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "gpt2")
NAMES = ("hook_resid_pre", "hook_resid_post", "hook_mlp_out", "hook_attn_out", "attn.hook_z")
IDS = torch.randint(5, 300, (3, 40), generator=torch.Generator().manual_seed(0))


def whole_model(path: Path) -> PreTrainedModel:
    """The model as its own library loads it, with the plainest attention."""
    return AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()


def named(model: PreTrainedModel, *names: str) -> torch.nn.Module:
    """The one module whose path ends in one of these names."""
    (found,) = [
        m for n, m in model.named_modules() if any(n.endswith(f".{name}") for name in names)
    ]
    return found


@torch.no_grad()
def activations_of_the_whole_model(path: Path, layer: int) -> dict[str, torch.Tensor]:
    """Activations by sae-lens name, from hidden_states and hooks of the untruncated model."""
    model = whole_model(path)
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str, module: torch.nn.Module, *, entering: bool = False) -> None:
        def see(value: Any) -> None:
            seen[name] = value[0] if isinstance(value, tuple) else value

        if entering:
            module.register_forward_pre_hook(lambda _, args: see(args))
        else:
            module.register_forward_hook(lambda _, __, out: see(out))

    normed = "gemma" in model.config.model_type
    here = (f"layers.{layer}", f"h.{layer}")
    attn = ("self_attn", "attention", "attn")
    attn = ("post_attention_layernorm",) if normed else attn
    mlp = "post_feedforward_layernorm" if normed else "mlp"
    out = ("self_attn.o_proj", "attention.dense", "attn.c_proj")
    keep("hook_attn_out", named(model, *(f"{at}.{name}" for at in here for name in attn)))
    keep("hook_mlp_out", named(model, *(f"{at}.{mlp}" for at in here)))
    keep("attn.hook_z", named(model, *(f"{a}.{o}" for a in here for o in out)), entering=True)
    states = model.forward(IDS, output_hidden_states=True).hidden_states
    return {**seen, "hook_resid_pre": states[layer], "hook_resid_post": states[layer + 1]}


def points(layer: int) -> dict[str, HookPoint]:
    return {name: HookPoint.parse(f"blocks.{layer}.{name}") for name in NAMES}


@pytest.mark.parametrize("layer", [0, 1])
def test_every_site_reads_what_the_whole_model_holds_there(any_tiny_lm, layer):
    expected = activations_of_the_whole_model(any_tiny_lm, layer)
    together = LanguageModel.load(any_tiny_lm, list(points(layer).values())).read(IDS)
    for name, point in points(layer).items():
        alone = LanguageModel.load(any_tiny_lm, [point])
        for read in (together[point], alone.read(IDS)[point]):
            torch.testing.assert_close(read, expected[name], rtol=1e-4, atol=1e-5, msg=name)
        assert expected[name].shape[-1] == width_at(load_config(any_tiny_lm), point)


@pytest.mark.parametrize("family", SEQUENTIAL)
def test_attention_and_mlp_are_what_a_layer_adds_to_the_stream(family, tiny_lm_of):
    lm = LanguageModel.load(tiny_lm_of(family), list(points(1).values()))
    read = {name: lm.read(IDS)[point] for name, point in points(1).items()}
    mid = read["hook_resid_pre"] + read["hook_attn_out"]
    torch.testing.assert_close(mid + read["hook_mlp_out"], read["hook_resid_post"])


def test_a_module_path_means_the_output_of_its_layer():
    for name in ("model.layers.12", "transformer.h.12", "gpt_neox.layers.12", "layers.12"):
        assert HookPoint.parse(name) == HookPoint(12, "resid_post")


@pytest.mark.parametrize("name", NAMES)
def test_a_hook_point_is_written_as_it_was_read(name):
    assert str(HookPoint.parse(f"blocks.3.{name}")) == f"blocks.3.{name}"


@pytest.mark.parametrize(
    "name", ["", "blocks.x.hook_resid_post", "blocks.1.hook_q", "model.layers.1.mlp", "blocks.1"]
)
def test_an_unknown_hook_point_is_refused_with_the_known_ones(name):
    with pytest.raises(ModelError, match="hook_resid_pre|hook_resid_post"):
        HookPoint.parse(name)


def test_rows_of_a_padded_batch_are_what_they_are_alone(any_tiny_lm):
    point = HookPoint.parse("blocks.1.hook_resid_post")
    lm = LanguageModel.load(any_tiny_lm, [point])
    lengths = (40, 1, 23, 17)
    batch = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for row, length in zip(batch, lengths, strict=True):
        row[:length] = IDS[length % 3, :length]
    together = lm.read(batch)[point]
    for row, ids, length in zip(together, batch, lengths, strict=True):
        alone = lm.read(ids[None, :length])[point][0]
        torch.testing.assert_close(row[:length], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sliding_window_is_kept_and_a_layer_keeps_its_own_kind(tiny_lm_of, dtype):
    """Gemma 3 slides in three layers and sees everything in the fourth; Mistral always slides."""
    for family, layer, reach in (("mistral", 0, 16), ("gemma3", 0, 16), ("gemma3", 3, 40)):
        point = HookPoint(layer, "z")
        lm = LanguageModel.load(tiny_lm_of(family), [point], dtype=dtype)
        if family == "gemma3" and layer == 3:
            other_first, far = 0, 1e-6
        else:
            other_first, far = 40 - reach - 1, 0.0
        changed = IDS.clone()
        changed[:, other_first] += 1
        difference = (lm.read(changed)[point] - lm.read(IDS)[point])[:, -1].abs().max()
        assert difference > far if far else difference == 0


def test_nothing_above_the_hook_point_is_loaded(any_tiny_lm):
    whole = whole_model(any_tiny_lm)
    lm = LanguageModel.load(any_tiny_lm, [HookPoint(1, "resid_post")])
    family = FAMILIES[load_config(any_tiny_lm).model_type]
    kept = [
        parameter.numel()
        for name, parameter in whole.get_submodule(whole.base_model_prefix).named_parameters()
        if not name.startswith(
            (f"{family.final_norm}.", f"{family.layers}.2", f"{family.layers}.3")
        )
    ]
    assert sum(parameter.numel() for parameter in lm.model.parameters()) == sum(kept)


def num_layers(lm: LanguageModel) -> int:
    return len(
        [
            name
            for name, _ in lm.model.named_modules()
            if name.startswith("layers.") and name.count(".") == 1
        ]
    )


def test_the_layer_that_a_resid_pre_enters_is_not_loaded(tiny_lm):
    one = LanguageModel.load(tiny_lm, [HookPoint(1, "resid_pre")])
    two = LanguageModel.load(tiny_lm, [HookPoint(1, "resid_pre"), HookPoint(1, "resid_post")])
    assert num_layers(one) == 1
    assert num_layers(two) == 2
    point = HookPoint(1, "resid_pre")
    torch.testing.assert_close(one.read(IDS)[point], two.read(IDS)[point])


def copied(path: Path, to: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    shutil.copytree(path, to)
    return to, load_file(to / "model.safetensors")


def write_weights(path: Path, weights: dict[str, torch.Tensor]) -> None:
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def test_a_checkpoint_without_its_upper_part_reads_the_same(any_tiny_lm, tmp_path):
    point = HookPoint(1, "resid_post")
    path, weights = copied(any_tiny_lm, tmp_path / "cut")
    family = FAMILIES[load_config(path).model_type]
    above = (f"{family.layers}.2.", f"{family.layers}.3.", f"{family.final_norm}.", "lm_head.")
    kept = {n: w for n, w in weights.items() if not any(f".{a}" in f".{n}" for a in above)}
    assert len(kept) < len(weights)
    write_weights(path, kept)
    read = LanguageModel.load(path, [point]).read(IDS)[point]
    assert torch.equal(read, LanguageModel.load(any_tiny_lm, [point]).read(IDS)[point])


def test_sharded_weights_read_the_same(tiny_lm, tmp_path):
    whole_model(tiny_lm).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    point = HookPoint(1, "resid_post")
    read = LanguageModel.load(tmp_path, [point]).read(IDS)[point]
    assert torch.equal(read, LanguageModel.load(tiny_lm, [point]).read(IDS)[point])


def test_the_text_part_of_a_model_that_sees_reads_like_the_text_model(tiny_lm_of, tmp_path):
    text = tiny_lm_of("gemma3")
    config = Gemma3Config(
        text_config=AutoConfig.from_pretrained(text).to_dict(),
        vision_config={
            **{"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1},
            **{"num_attention_heads": 2, "image_size": 28, "patch_size": 14},
        },
        mm_tokens_per_image=1,
    )
    model = Gemma3ForConditionalGeneration(config)
    decoder, written = model.get_decoder(), whole_model(text).base_model
    assert isinstance(decoder, torch.nn.Module)
    assert isinstance(written, torch.nn.Module)
    decoder.load_state_dict(written.state_dict())
    model.save_pretrained(tmp_path)
    point = HookPoint(1, "resid_post")
    read = LanguageModel.load(tmp_path, [point]).read(IDS)[point]
    assert torch.equal(read, LanguageModel.load(text, [point]).read(IDS)[point])


def test_bfloat16_agrees_with_float32_to_its_precision(any_tiny_lm):
    ids = IDS.repeat(1, 5)  # several blocks of queries
    point = HookPoint(1, "resid_post")
    exact = LanguageModel.load(any_tiny_lm, [point]).read(ids)[point]
    lm = LanguageModel.load(any_tiny_lm, [point], dtype="bfloat16")
    read = lm.read(ids)[point]
    assert read.dtype == torch.bfloat16
    assert (read.float() - exact).norm() / exact.norm() < 0.02


def test_loading_says_nothing(any_tiny_lm, capfd):
    LanguageModel.load(any_tiny_lm, [HookPoint(0, "resid_post")])
    assert capfd.readouterr() == ("", "")


def test_pickled_weights_are_refused(tiny_lm, tmp_path):
    path, weights = copied(tiny_lm, tmp_path / "bin")
    torch.save(weights, path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="safetensors only"):
        LanguageModel.load(path, [HookPoint(0, "resid_post")])


def test_a_missing_weight_is_named(tiny_lm, tmp_path):
    path, weights = copied(tiny_lm, tmp_path / "holes")
    name = next(name for name in weights if name.endswith("layers.0.mlp.up_proj.weight"))
    write_weights(path, {n: w for n, w in weights.items() if n != name})
    with pytest.raises(ModelError, match=r"layers\.0\.mlp\.up_proj\.weight, is missing"):
        LanguageModel.load(path, [HookPoint(1, "resid_post")])


def test_a_weight_of_another_shape_is_named(tiny_lm, tmp_path, capfd):
    path, weights = copied(tiny_lm, tmp_path / "shape")
    name = next(name for name in weights if name.endswith("layers.0.mlp.up_proj.weight"))
    write_weights(path, weights | {name: torch.zeros(2, 2)})
    with pytest.raises(ModelError, match=r"up_proj\.weight, has another shape"):
        LanguageModel.load(path, [HookPoint(1, "resid_post")])
    assert capfd.readouterr().err == ""


def test_broken_weights_are_refused(tiny_lm, tmp_path):
    path, _ = copied(tiny_lm, tmp_path / "broken")
    content = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelError, match="cannot load the weights"):
        LanguageModel.load(path, [HookPoint(1, "resid_post")])


def test_an_unknown_family_is_refused_with_the_known_ones(tiny_lm, tmp_path):
    shutil.copytree(tiny_lm, tmp_path / "opt")
    AutoConfig.for_model("opt").save_pretrained(tmp_path / "opt")
    with pytest.raises(
        ModelError, match="type 'opt' are not supported: choose one of llama, mistral"
    ):
        LanguageModel.load(tmp_path / "opt", [HookPoint(0, "resid_post")])


def test_a_layer_above_the_last_is_refused(tiny_lm):
    with pytest.raises(ModelError, match=r"blocks\.3\.hook_resid_post: .* has layers 0 to 2;"):
        LanguageModel.load(tiny_lm, [HookPoint(3, "resid_post")])


@pytest.mark.parametrize("config", [None, "{", '{"no": "model_type"}'])
def test_a_folder_without_a_model_is_refused_in_one_line(config, tmp_path):
    if config:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(ModelError, match=r"^no language model at .*; give a folder") as error:
        LanguageModel.load(tmp_path, [HookPoint(0, "resid_post")])
    assert "\n" not in str(error.value)


def test_code_that_comes_with_a_model_is_not_run(tiny_lm, tmp_path):
    path, _ = copied(tiny_lm, tmp_path / "code")
    config = json.loads((path / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}
    (path / "config.json").write_text(json.dumps(config))
    (path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    with pytest.raises(ModelError, match="no language model at"):
        LanguageModel.load(path, [HookPoint(0, "resid_post")])
    assert not (tmp_path / "ran").exists()
