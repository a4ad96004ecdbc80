"""One description for every kind; and what TRL makes of the models that come back."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer  # pyright: ignore[reportPrivateImportUsage]

from sae_ray.adapters.attach import AdapterSpec, attach
from sae_ray.adapters.edits import LATENT_KINDS
from sae_ray.errors import ConfigError, ModelError

LN2 = 0.6931471805599453


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"kind": "steering", "sae": ("s",), "r": 4}, "and not r"),
        ({"kind": "lora", "positions": "all"}, "and not positions"),
        ({"kind": "scale", "sae": ("s",), "hidden": 4}, "and not hidden"),
        ({"kind": "scale"}, "adapter scale needs sae"),
        ({"kind": "subspace"}, "adapter subspace needs subspaces"),
        ({"kind": "scale", "sae": ("s", "t"), "latents": (1,)}, "numbers of one SAE"),
        ({"kind": "scale", "sae": ("s",), "latents": ()}, "at least one"),
        ({"kind": "scale", "sae": ("s",), "l1": -1.0}, "at least 0"),
        ({"kind": "lora", "r": 0}, "at least"),
        ({"kind": "scale", "sae": ("s", "t"), "hook_points": ("h",)}, "give each its own"),
    ],
)
def test_a_setting_that_would_mean_nothing_is_refused(settings, why):
    with pytest.raises(ConfigError, match=why):
        AdapterSpec(**settings)


def test_lora_is_plain(tiny_lm, whole):
    adapted = attach(whole(tiny_lm), AdapterSpec(kind="lora", r=4, targets=("q_proj",)))
    assert adapted.get_nb_trainable_parameters()[0] == 3 * 4 * (32 + 32)
    assert adapted.peft_config["default"].lora_alpha == 4  # pyright: ignore[reportAttributeAccessIssue]


def test_lora_changes_the_layers_that_are_named_and_no_head_on_every_family(any_tiny_lm, whole):
    base = whole(any_tiny_lm)
    adapted = attach(base, AdapterSpec(kind="lora", r=4, layers=(1,)))
    changed = [name for name, one in adapted.named_parameters() if one.requires_grad]
    assert changed
    assert all(".1." in name for name in changed)
    everywhere = attach(whole(any_tiny_lm), AdapterSpec(kind="lora", r=4))
    of_one = [
        name for name, one in everywhere.named_parameters() if one.requires_grad and ".1." in name
    ]
    assert sorted(changed) == sorted(of_one)


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ({"layers": (0, 7)}, "layers=7 and the model has layers 0 to 2"),
        ({"layers": (-1,)}, "layers=-1 and the model has layers"),
        ({"targets": ("q_proj", "lm_head")}, "targets=lm_head and the model has"),
    ],
)
def test_a_layer_or_matrix_that_is_not_there_is_named(where, said, tiny_lm, whole):
    with pytest.raises(ModelError, match=said):
        attach(whole(tiny_lm), AdapterSpec(kind="lora", **where))


def first_losses(model, tokenizer, folder: Path) -> list[float]:
    """DPO losses of three steps at a learning rate of zero."""
    pairs = Dataset.from_list(
        [
            {"prompt": f"Write {i}.", "chosen": " a query that counts", "rejected": " orders" * i}
            for i in range(1, 7)
        ]
    )
    config = DPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        max_steps=3,
        learning_rate=0.0,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        gradient_checkpointing=False,
    )
    trainer = DPOTrainer(model, args=config, train_dataset=pairs, processing_class=tokenizer)
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*LATENT_KINDS, "lora"])
@pytest.mark.parametrize("continued", [False, True])
def test_the_first_dpo_loss_is_ln_2_fresh_and_continued(
    kind, continued, tmp_path, tiny_lm, whole, sae_at
):
    saes = (sae_at("blocks.1.hook_resid_post"), sae_at("blocks.1.attn.hook_z"))
    spec = AdapterSpec(kind=kind) if kind == "lora" else AdapterSpec(kind=kind, sae=saes)
    adapted = attach(whole(tiny_lm), spec)
    if continued:  # as after SFT
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    tokenizer = AutoTokenizer.from_pretrained(tiny_lm)
    losses = first_losses(adapted, tokenizer, tmp_path / "out")
    assert losses == pytest.approx([LN2] * 3, abs=1e-6)
