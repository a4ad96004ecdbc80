#!/usr/bin/env python
"""The whole service on one laptop: from a sentence to a selection, its page, and an expert."""

import sys
from pathlib import Path
from typing import cast

from pydantic import Field
from rich.console import Console

from sae_ray.adapters.settings import FinetuneSettings
from sae_ray.config import require_absolute_inside_ray_job, run_job
from sae_ray.curate.index import FeatureIndex
from sae_ray.curate.output import preview, write_random
from sae_ray.curate.request import Request, Task
from sae_ray.curate.settings import IndexSettings
from sae_ray.distributed.expert import ExpertMaker
from sae_ray.distributed.indexes import ensure_index
from sae_ray.distributed.progress import follow, watch
from sae_ray.evaluate.exam import examine, tabulate
from sae_ray.experts.registry import ExpertRegistry
from sae_ray.experts.tables import told
from sae_ray.explain.curation import Curator


class Config(IndexSettings):
    """The whole service on one laptop: from a sentence to a selection, its page, and an expert.

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
    print("\n".join(preview(selection, 3)))

    print("4. train an expert on them, and one on as many random rows")
    random, num_rows = str(folder / "random.jsonl"), cast("int", manifest.extra["num_rows"])
    write_random(FeatureIndex(index, config.lm, config.sae), num_rows, random)
    for name, data in (("expert", selection), ("random", random)):
        few = {"num_epochs": 5, "micro_rows": 16, "general_rows": 16, "num_workers": 0}
        settings = FinetuneSettings(lm=config.lm, data=data, **few)
        maker = ExpertMaker(settings, str(folder / name), name=name, description=config.task)
        follow(maker.make())
        expert = maker.register(ExpertRegistry(str(folder / "registry")))
        print(f"   {name}: {expert.status}, {told(expert.card.measures[0])}")
    if not own:
        Console().print(
            tabulate(examine({n: folder / n / "adapter" for n in ("expert", "random")}))
        )
    print(f"\nOpen {selection}/report.html; tick rows there and run what it composes.")
    print(f"What the expert learnt: {folder}/expert/report.html")


if __name__ == "__main__":
    sys.exit(run_job(main, Config))
