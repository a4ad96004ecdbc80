"""Saving what was trained, whole: also where ZeRO-3 has sharded it, and with its frozen factors."""

from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor
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
    if isinstance(model, PeftModel):
        state = _adapter_state(model, world)
    else:
        state = {}
        for name, parameter in model.named_parameters():  # pyright: ignore[reportAttributeAccessIssue]
            with world.gathered([parameter]):  # one at a time: all of them need not fit
                if world.rank == 0:
                    state[name] = parameter.detach().cpu().clone()
    if world.rank:
        return
    if isinstance(model, PeftModel):
        model.save_pretrained(
            str(folder), state_dict=state, selected_adapters=[NAME], save_embedding_layers=False
        )
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty card; ours says more
    else:
        model.save_pretrained(str(folder), state_dict=state)  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
        tokenizer: Any = trainer.processing_class
        tokenizer.save_pretrained(str(folder))


def _adapter_state(model: PeftModel, world: World) -> dict[str, Tensor]:
    """Return the adapter's tensors under the names that its modules give them.

    Of those that are made of others, as a subspace's core is, only the state dict knows the name.
    """
    mine = {name: p for name, p in model.named_parameters() if _is_of_adapter(name)}
    with world.gathered(list(mine.values())):
        whole = {name: p for name, p in model.state_dict().items() if _is_of_adapter(name)}
        return {name: tensor.detach().cpu().clone() for name, tensor in whole.items()}


def _is_of_adapter(name: str) -> bool:
    return f".{NAME}." in name or name.endswith(f".{NAME}")
