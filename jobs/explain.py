#!/usr/bin/env python
"""What an expert's training changed: which latents did it, checked, and in words."""

import sys

from sae_ray.artifacts import open_artifact
from sae_ray.config import OutputPath, run_job
from sae_ray.distributed.dials import dials_over
from sae_ray.distributed.progress import follow
from sae_ray.explain.adapter import KIND, Explaining, ExplainSettings


class Config(ExplainSettings):
    """What an expert's training changed: which latents did it, checked, and in words.

    python jobs/explain.py --expert runs/maths-expert --out runs/maths-why
    python jobs/explain.py --expert runs/lora-expert --sae ./sae --out runs/lora-why

    Latents are ranked on one half of the expert's held-out rows and checked on the other, each by
    itself; the summary names those alone that bear their scores out. Of adapters that change
    weights (lora, subspace) it tells how the latents drift.
    """

    out: OutputPath
    """Folder or URL of the explanation."""


def main(config: Config) -> None:
    """Explain the expert and say what came of it."""
    follow(Explaining(config, config.out, dials_over).run())
    manifest = open_artifact(config.out, KIND)
    for warning in manifest.warnings:
        print(f"warning: {warning}")
    print(manifest.extra["summary"])
    print(f"{config.out}: read {config.out}/report.html")


if __name__ == "__main__":
    sys.exit(run_job(main, Config))
