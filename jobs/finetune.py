#!/usr/bin/env python
"""Turn a selection, or any conversations or pairs, into an expert: measured and registered."""

import sys

from sae_ray.adapters.settings import FinetuneSettings
from sae_ray.config import OutputPath, run_job
from sae_ray.distributed.expert import ExpertMaker
from sae_ray.distributed.progress import follow
from sae_ray.experts.card import ExpertName
from sae_ray.experts.registry import ExpertRegistry
from sae_ray.experts.tables import told


class Config(FinetuneSettings):
    """Turn a selection, or any conversations or pairs, into an expert: measured and registered.

    python jobs/finetune.py --out runs/expert
    python jobs/finetune.py --lm ./model --data runs/maths --name maths --out runs/maths-expert
    python jobs/finetune.py --objective dpo --data pairs.jsonl --adapter steering --out runs/polite
    ray job submit --working-dir . -- python jobs/finetune.py --zero_stage 3 --num_workers 8 ...

    On Ray, a run that was killed goes on from its last checkpoint when the line is given again;
    with --num_workers 0 it begins anew. The expert becomes active if it beats its base on held-out
    rows; if not, it stays a candidate.
    """

    name: ExpertName = "expert"
    """Name of the expert; another one of that name is its next version."""
    description: str | None = None
    """The task in a sentence. Default: that of the selection."""
    out: OutputPath
    """Folder or URL of the expert."""
    registry: OutputPath | None = None
    """Folder or URL of the registry. Default: OUT-registry."""


def main(config: Config) -> None:
    """Train, measure, register, and say what came of it."""
    maker = ExpertMaker(config, config.out, name=config.name, description=config.description)
    follow(maker.make())
    registry = ExpertRegistry(config.registry or f"{config.out.rstrip('/')}-registry")
    expert = maker.register(registry)
    for warning in maker.manifest.warnings:
        print(f"warning: {warning}")
    for measure in expert.card.measures:
        print(told(measure))
    counts = maker.manifest.extra
    print(
        f"{config.out}: {expert.card.name}@{expert.version} is {expert.status} in {registry.path}, "
        f"trained on {counts['num_rows']:,} rows ({counts['num_rejected']:,} rejected), "
        f"{expert.card.num_parameters:,} parameters ({expert.card.share:.2%}); read "
        f"{config.out}/report.html"
    )


if __name__ == "__main__":
    sys.exit(run_job(main, Config))
