"""Models on the Hugging Face hub, held to one revision by their name: `name@revision`."""

from pathlib import Path
from typing import TypedDict


class HubArguments(TypedDict):
    """What `from_pretrained` takes to find a model."""

    pretrained_model_name_or_path: str
    revision: str


def hub_arguments(model: str | Path) -> HubArguments:
    """Split a model's name; a folder, and a name without a revision, stand for what is there now.

    So that all workers of a run, and whoever opens its result later, read the same weights, a name
    is given on with the revision that it meant when the run began.
    """
    name, at, revision = str(model).rpartition("@")
    if not at or Path(model).exists():
        name, revision = str(model), "main"
    return {"pretrained_model_name_or_path": name, "revision": revision}
