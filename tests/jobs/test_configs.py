"""Presets of real models: built from their published sizes, without a byte of their weights."""

import functools
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from jobs import curate, finetune, index, label_latents, serve, train_sae
from sae_ray.adapters.attach import attach
from sae_ray.lm import HookPoint, require_layer

CONFIGS = Path(__file__).parents[2] / "jobs" / "configs"
PRESETS = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name != "smoke")
SIZES: dict[str, dict[str, Any]] = {
    "EleutherAI/pythia-70m-deduped": {
        "model_type": "gpt_neox",
        "vocab_size": 50304,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
    },
    "google/gemma-2-2b": {
        "model_type": "gemma2",
        "vocab_size": 256000,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
    },
    "meta-llama/Llama-3.2-3B-Instruct": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": True,
    },
    "Qwen/Qwen2.5-7B-Instruct": {
        "model_type": "qwen2",
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
}
"""As the models' own config.json have them."""
PARAMETERS = {
    "EleutherAI/pythia-70m-deduped": 70_426_624,
    "google/gemma-2-2b": 2_614_341_888,
    "meta-llama/Llama-3.2-3B-Instruct": 3_212_749_824,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
}
"""As the models' cards have them."""
GPU_BYTES = 80e9


def config_of(lm: str) -> PretrainedConfig:
    sizes = dict(SIZES[lm])
    return AutoConfig.for_model(sizes.pop("model_type"), **sizes)


def build(lm: str) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config_of(lm), dtype=torch.bfloat16)


def count(model: Any, *, trained: bool = False) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained)


@functools.cache
def registry() -> dict[str, Any]:
    """Read sae-lens' registry of releases from its own file."""
    found = importlib.util.find_spec("sae_lens")
    assert found is not None
    assert found.origin is not None
    path = Path(found.origin).parent / "pretrained_saes.yaml"
    return yaml.load(path.read_text(), yaml.CSafeLoader)


def test_there_are_presets() -> None:
    assert {path.parent.name.split("_")[-1] for path in PRESETS} == {"cpu", "1gpu", "8gpu"}
    assert {yaml.safe_load(path.read_text())["lm"] for path in PRESETS} == SIZES.keys()


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_the_saes_of_a_preset_are_published_for_its_model(path: Path) -> None:
    settings = yaml.safe_load(path.read_text())
    saes = settings.get("sae") or []
    for one in [saes] if isinstance(saes, str) else saes:
        release, _, sae_id = one.partition(":")
        published = registry()[release]
        assert sae_id in [entry["id"] for entry in published["saes"]]
        assert published["model"].split("/")[-1] == settings["lm"].split("/")[-1]
        layer = re.search(r"(?:blocks\.|layer_)(\d+)", sae_id)
        assert layer is not None
        point = HookPoint(int(layer[1]), "resid_post")
        require_layer(point, config_of(settings["lm"]), settings["lm"])


JOBS = {
    "curate": (curate, ["--task", "Write a query"]),
    "finetune": (finetune, []),
    "index": (index, []),
    "label_latents": (label_latents, []),
    "serve": (serve, []),
    "train_sae": (train_sae, []),
}


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_preset_is_what_its_job_takes(path: Path, tmp_path: Path) -> None:
    job, flags = next(one for name, one in JOBS.items() if path.stem.startswith(name))
    out = [] if job is serve else ["--out", str(tmp_path / "out")]
    # What is read is given at the command line where a preset does not name it.
    own = ["--pool", "chats.jsonl"] if job in (curate, index) else []
    settings = job.Config.parse(["--config", str(path), *flags, *own, *out])
    assert settings.lm == yaml.safe_load(path.read_text())["lm"]


@pytest.mark.parametrize(
    "path",
    [p for p in PRESETS if p.stem == "train_sae"],
    ids=lambda path: path.parent.name,
)
def test_the_saes_of_a_preset_fit_where_they_are_trained(path: Path) -> None:
    settings = train_sae.Config.parse(["--config", str(path), "--out", "out"])
    config = config_of(str(settings.lm))
    specs = settings.specs(config, str(settings.lm))
    d_in = config.hidden_size
    # Weights, gradient and two moments in float32 of encoder and decoder; and a batch's latents.
    each = [16 * 2 * spec.d_sae * d_in for spec in specs]
    shared = settings.num_workers if settings.placement == "saes" else 1
    weights = (4 if settings.dtype == "float32" else 2) * PARAMETERS[str(settings.lm)]
    batch = settings.recipe().batch_tokens
    latents = max(4 * batch * spec.d_sae * 4 for spec in specs)
    buffer = settings.room_batches * batch * d_in * 4 * len(settings.hook_points)
    needed = weights + sum(each) / shared + latents + buffer
    assert needed < (16e9 if "cpu" in path.parent.name else 0.8 * GPU_BYTES)


@pytest.mark.slow
@pytest.mark.parametrize("lm", SIZES)
def test_lora_on_the_real_architecture_is_a_small_share_of_it(lm: str) -> None:
    model = build(lm)
    assert count(model) == PARAMETERS[lm]
    settings = finetune.Config.parse(["--lm", lm, "--out", "out"])
    spec = settings.spec(())
    assert spec is not None
    linear = [m for n, m in model.named_modules() if _is_adapted(n, m)]
    expected = sum(spec.r * (one.in_features + one.out_features) for one in linear)
    adapted = attach(model, spec)
    assert count(adapted, trained=True) == expected
    assert expected / PARAMETERS[lm] < 0.03


@pytest.mark.parametrize(
    "path",
    [p for p in PRESETS if p.stem.startswith("finetune") and "gpu" in p.parent.name],
    ids=lambda path: f"{path.parent.name}-{path.stem}",
)
def test_what_a_preset_trains_fits_its_gpus(path: Path) -> None:
    settings = finetune.Config.parse(["--config", str(path), "--out", "out"])
    num = PARAMETERS[str(settings.lm)]
    trained = num if settings.adapter == "full" else 0.01 * num
    # bf16 weights; and for what is trained a bf16 gradient, and in float32 itself and two moments.
    weights, states = 2 * num, (2 + 4 + 8) * trained
    workers = settings.num_workers or 1
    share = (weights + states) / workers if settings.zero_stage == 3 else weights + states
    hidden = config_of(str(settings.lm)).hidden_size
    layers = config_of(str(settings.lm)).num_hidden_layers
    # Checkpointed: the stream between layers, and the logits of a row at a time in float32.
    kept = settings.micro_rows * settings.max_tokens * hidden * layers * 2
    assert settings.gradient_checkpointing
    assert share + kept < 0.7 * GPU_BYTES


def _is_adapted(name: str, module: Any) -> bool:
    head = name.endswith(("lm_head", "embed_out"))
    return isinstance(module, torch.nn.Linear) and not head
