"""Loading a whole language model, and putting on it an adapter that is new or goes on."""

from collections.abc import Iterator
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from sae_ray.adapters.attach import AdapterSpec, attach, hold_again
from sae_ray.errors import ModelError
from sae_ray.hub import hub_arguments
from sae_ray.lm import DTypeName, by_its_old_name, load_config, quiet_loading


def load_causal(lm: str, dtype: DTypeName) -> PreTrainedModel:
    """Load a whole language model, from safetensors only, with every weight that it has.

    Raises:
        ModelError: there is none, or some of its weights are missing.
    """
    load_config(lm)  # says what is wrong with it in one line
    try:
        with quiet_loading():
            model, info = AutoModelForCausalLM.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
                **hub_arguments(lm),
                dtype=getattr(torch, dtype),
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # so that they are counted, and refused below
            )
    except (OSError, ValueError) as error:
        raise ModelError(
            f"cannot load the weights of {lm}: {str(error).splitlines()[0]}; weights are read from "
            "safetensors only (convert .bin files with save_pretrained)"
        ) from error
    if wrong := sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}):
        raise ModelError(
            f"{lm} lacks {len(wrong)} of the weights that its config.json asks for, or has them in "
            f"another shape: the first is {wrong[0]}; download it again, or mend config.json"
        )
    return model


def adapted(
    base: PreTrainedModel, adapter: AdapterSpec | None, start_from: Path | None
) -> PreTrainedModel | PeftModel:
    """Put a new adapter on a model, or one that is there already.

    Raises:
        ModelError: that one is of another model, or of another kind than is asked for.
    """
    if start_from is not None:
        try:
            with by_its_old_name():
                model = PeftModel.from_pretrained(base, str(start_from), is_trainable=True)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise ModelError(
                f"{start_from} is no adapter of this model ({str(error).splitlines()[0]}): give a "
                "PEFT folder that was trained on it"
            ) from error
        if adapter is not None:
            _require_kind(model, adapter, start_from)
        if adapter is not None and adapter.kind == "subspace":
            hold_again(model, adapter)
        return model
    with by_its_old_name():
        return base if adapter is None else attach(base, adapter)


def _require_kind(model: PeftModel, adapter: AdapterSpec, start_from: Path) -> None:
    config = model.peft_config["default"]
    found = getattr(config, "kind", "lora")
    wanted = "lora" if adapter.kind == "subspace" else adapter.kind
    if found != wanted:
        raise ModelError(
            f"adapter={adapter.kind} is to go on from {start_from}, which holds {found}: say "
            f"--adapter {found}, or start from another"
        )


def vectors(model: PreTrainedModel) -> list[torch.nn.Parameter]:
    """Return the parameters of one dimension: gains and biases."""
    return [p for p in model.parameters() if len(getattr(p, "ds_shape", p.shape)) == 1]


def count(parameters: Iterator[torch.nn.Parameter]) -> int:
    """Count parameters, also those that ZeRO-3 has sharded."""
    return sum(int(getattr(p, "ds_numel", p.numel())) for p in parameters)
