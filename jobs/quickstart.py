#!/usr/bin/env python
"""The whole service on one laptop: a sentence, its selection, an expert, a mixture that answers."""

import sys
from pathlib import Path

from pydantic import Field

from sae_ray.adapters.settings import AdapterName, quick
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
from sae_ray.explain.asking import SECOND, try_out
from sae_ray.explain.curation import Curator
from sae_ray.explain.telling import why


class Config(IndexSettings):
    """The whole service on one laptop: a sentence, its selection, an expert, and a mixture.

    python jobs/quickstart.py
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
    """Go the whole way; with the embedded default, to a mixture that answers."""
    folder = Path(require_absolute_inside_ray_job("out")) / config.name
    own = config.pool is not None or config.lm is not None
    registry = ExpertRegistry(f"{folder}/registry")

    def curate(name: str, task: str) -> str:
        request = Request(task=task, budget_examples=config.budget_examples)
        Curator(index).curate(request, f"{folder}/{name}")
        print(*preview(f"{folder}/{name}", 3), sep="\n")
        return f"{folder}/{name}"

    def train(name: str, data: str, adapter: AdapterName = "lora") -> ExpertMaker:
        maker = ExpertMaker(quick(config.lm, data, adapter), f"{folder}/{name}", name=name)
        follow(maker.make())
        print(f"   {name}: {told(maker.card.measures[0])}")
        return maker

    print("1. read the pool once through a model and its SAE")
    watch(ensure_index(config, place := str((folder if own else folder.parent) / ".index")))
    index = FeatureIndex(place, config.lm, config.sae)
    print(f"2. curate for: {config.task}; the first rows, and why")
    selection = curate("selection", config.task)
    print("3. train an expert on them, and one on as many random rows")
    train("expert", selection).register(registry)
    train("random", write_random(index, selection, f"{folder}/random.jsonl"))
    if not own:
        print(tabulate(examine({one: folder / one / "adapter" for one in ("expert", "random")})))
        print("4. the same rows again, learnt by numbers on SAE latents: which of them did it")
        train("steering", selection, "steering")
        print(*why(f"{folder}/steering", f"{folder}/why", follow), sep="\n")
        print(f"5. a second expert, for: {SECOND}; and both behind one address")
        train("second", curate("second-selection", SECOND)).register(registry)
        print(*try_out(registry, f"{folder}/router", Path(__file__).parent), sep="\n")
    print("\nNow open", *sorted(folder.glob("*/report.html")), sep="\n   ")


if __name__ == "__main__":
    sys.exit(run_job(main, Config))
