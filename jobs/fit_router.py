#!/usr/bin/env python
"""From a registry to a router: which of the experts in use answers a query, or the base."""

import sys

from pydantic import Field
from rich.console import Console

from sae_ray.config import JobConfig, OutputPath, run_job
from sae_ray.experts.fitting import Kind
from sae_ray.experts.gathering import gather, sources_of, tabulate
from sae_ray.experts.registry import ExpertRegistry


class Config(JobConfig):
    """From a registry to a router: which of the experts in use answers a query, or the base.

    python jobs/fit_router.py --registry runs/experts --background chats.jsonl --out runs/router
    python jobs/fit_router.py --registry runs/experts --kind logistic --out runs/router

    At most about 5 % of the background's prompts leave the base; printed is the share of others,
    which were held out. For the embedded model the embedded pool stands in for a background; the
    experts' own tasks occur in it, so that nothing is promised then, and more of it leaves.
    """

    registry: OutputPath
    """Folder or URL of the registry."""
    kind: Kind = "knn"
    """How it decides: by a few centroids of each expert's prompts (zero_shot), by the prompts
    themselves (knn), or by a classifier trained on them (logistic)."""
    background: str | None = None
    """Conversations that no expert should answer: any pool. Required but for the embedded model,
    whose own pool stands in."""
    num_background: int = Field(default=1000, ge=50)
    """Prompts drawn of the background to fit on; a quarter more is held out to measure."""
    lm: str | None = None
    """The experts' base: a folder or a Hugging Face name. Default: what their cards name."""
    sae: str | None = None
    """SAE of that model. Default: the embedded one if the model is, else what the cards name."""
    labels: str | None = None
    """What its latents stand for: a label file, or a file or folder of Neuronpedia's explanations;
    a path or URL. Default: labels.json in or beside its folder."""
    seed: int = 0
    """Of the draw of the background."""
    out: OutputPath
    """Folder or URL of the router."""


def main(config: Config) -> None:
    """Fit a router over the experts in use, and show what it knows."""
    registry = ExpertRegistry(config.registry)
    lm, sae = sources_of(registry, config.lm, config.sae)
    router, held = gather(
        registry,
        config.background,
        lm=lm,
        sae=sae,
        labels=config.labels,
        kind=config.kind,
        num_background=config.num_background,
        seed=config.seed,
    )
    router.save(config.out, lm, sae)
    Console().print(tabulate(router, held))
    print(f"{config.out}: a {config.kind} router over {len(router.experts)} experts")


if __name__ == "__main__":
    sys.exit(run_job(main, Config))
