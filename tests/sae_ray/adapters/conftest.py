"""What the tests of adapters share: a SAE of any hook point of any tiny model."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel


@pytest.fixture(scope="session")
def whole() -> Callable[[Path], PreTrainedModel]:
    """Loads a whole tiny model in fp32."""

    def load(path: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation="eager"
        ).eval()

    return load


@pytest.fixture
def sae_at(tmp_path: Path, make_tiny_sae: Callable[..., Path]) -> Callable[..., str]:
    """Saves a SAE for a hook point: 32 values in, 64 latents, with biases that matter."""

    def save(hook_point: str, seed: int = 0) -> str:
        folder = make_tiny_sae(tmp_path / f"sae-{hook_point}-{seed}", hook_point, seed)
        weights = load_file(folder / "sae_weights.safetensors")
        generator = torch.Generator().manual_seed(seed + 100)
        weights["b_dec"] = 0.1 * torch.randn(32, generator=generator)
        weights["b_enc"] = 0.1 * torch.randn(64, generator=generator)
        weights["threshold"] = torch.full((64,), 0.1)
        save_file(weights, folder / "sae_weights.safetensors")
        return str(folder)

    return save
