"""Loading a whole language model, and putting on it an adapter that is new or goes on."""

from collections.abc import Iterator
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from sae_ray.adapters.attach import AdapterSpec, attach, hold_again
from sae_ray.errors import ModelError
from sae_ray.lm import DTypeName, by_its_old_name, load_config, quiet_loading


def load_causal(lm: str, dtype: DTypeName) -> PreTrainedModel:
    """Load a whole language model, from safetensors only."""
    load_config(lm)  # says what is wrong with it in one line
    try:
        with quiet_loading():
            return AutoModelForCausalLM.from_pretrained(
                lm,
                dtype=getattr(torch, dtype),
                use_safetensors=True,
                trust_remote_code=False,
            )
    except (OSError, ValueError) as error:
        raise ModelError(
            f"cannot load the weights of {lm}: {str(error).splitlines()[0]}; weights are read from "
            "safetensors only (convert .bin files with save_pretrained)"
        ) from error


def adapted(
    base: PreTrainedModel, adapter: AdapterSpec | None, start_from: Path | None
) -> PreTrainedModel | PeftModel:
    """Put a new adapter on a model, or one that is there already."""
    if start_from is not None:
        try:
            with by_its_old_name():
                model = PeftModel.from_pretrained(base, str(start_from), is_trainable=True)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise ModelError(
                f"{start_from} is no adapter of this model ({str(error).splitlines()[0]}): give a "
                "PEFT folder that was trained on it"
            ) from error
        if adapter is not None and adapter.kind == "subspace":
            hold_again(model, adapter)
        return model
    with by_its_old_name():
        return base if adapter is None else attach(base, adapter)


def count(parameters: Iterator[torch.nn.Parameter]) -> int:
    """Count parameters, also those that ZeRO-3 has sharded."""
    return sum(int(getattr(p, "ds_numel", p.numel())) for p in parameters)
