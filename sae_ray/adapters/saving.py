"""Saving what was trained, whole: also where ZeRO-3 has sharded it, and with its frozen factors."""

from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import Trainer

from sae_ray.adapters.objectives import World

NAME = "default"
"""Of the adapter that is trained; TRL's DPO keeps its reference beside it as `ref`."""


def save_model(trainer: Trainer, folder: Path, world: World) -> None:
    """Write the trained adapter as PEFT does, or the whole model; every worker must call this.

    Args:
        trainer: whose model it is.
        folder: local; rank 0 alone writes.
        world: how sharded parameters are made whole.
    """
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    peft = isinstance(model, PeftModel)
    parameters = {
        name: parameter
        for name, parameter in model.named_parameters()  # pyright: ignore[reportAttributeAccessIssue]
        if not peft or f".{NAME}." in name or name.endswith(f".{NAME}")
    }
    with world.gathered(list(parameters.values())):
        state = {name: p.detach().cpu().clone() for name, p in parameters.items()}
    if world.rank:
        return
    if peft:
        model.save_pretrained(
            str(folder), state_dict=state, selected_adapters=[NAME], save_embedding_layers=False
        )
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty card; ours says more
    else:
        model.save_pretrained(str(folder), state_dict=state)  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
        tokenizer: Any = trainer.processing_class
        tokenizer.save_pretrained(str(folder))
