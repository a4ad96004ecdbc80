#!/usr/bin/env python
"""The whole service on one laptop: from a sentence to a selection and the page that explains it."""

import sys
from pathlib import Path

from pydantic import Field

from sae_ray.config import require_absolute_inside_ray_job, run_job
from sae_ray.curate.index import FeatureIndex
from sae_ray.curate.output import preview
from sae_ray.curate.request import Request, Task
from sae_ray.curate.settings import IndexSettings
from sae_ray.distributed.indexes import ensure_index
from sae_ray.distributed.progress import watch
from sae_ray.explain.curation import Curator


class Config(IndexSettings):
    """The whole service on one laptop: from a sentence to a selection, and the page about it.

    python jobs/quickstart.py
    python jobs/quickstart.py --task "Say which cooking step comes next in a recipe" --name cooking
    python jobs/quickstart.py --task "..." --pool chats.jsonl --lm ./model --sae ./sae --name mine

    Everything lands under out/NAME; a second task over the embedded pool reuses its index.
    """

    task: Task = "Put numbers in order from small to large"
    """What a model should get good at, in a sentence."""
    name: str = Field(default="quickstart", pattern=r"^\w[\w.-]*$")
    """Name of this run: letters, digits, dots, dashes and underscores."""
    budget_examples: int = Field(default=200, ge=1)
    """Rows to select."""


def main(config: Config) -> None:
    """Read the pool, curate for one sentence, and show the first rows."""
    folder = Path(require_absolute_inside_ray_job("out")) / config.name
    own = config.pool is not None or config.lm is not None
    index = str(folder / "index" if own else folder.parent / "embedded-index")

    print("1. read the pool once through a model and its SAE")
    watch(ensure_index(config, index))

    print(f"2. curate for: {config.task}")
    selection = str(folder / "selection")
    request = Request(task=config.task, budget_examples=config.budget_examples)
    manifest = Curator(FeatureIndex(index, config.lm, config.sae)).curate(request, selection)
    for warning in manifest.warnings:
        print(f"   {warning}")

    print("3. the first rows, and why")
    for text in preview(selection, 3):
        print(text)
    print(f"\nOpen {selection}/report.html; tick rows there and run what it composes.")


if __name__ == "__main__":
    sys.exit(run_job(main, Config))
