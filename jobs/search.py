#!/usr/bin/env python
"""Search where and how to train: layers, components, kinds, rates; the best, over seeds."""

import sys

from sae_ray.adapters.search_settings import SearchSettings
from sae_ray.config import OutputPath, run_job
from sae_ray.distributed.progress import follow
from sae_ray.distributed.study import StudyMaker


class Config(SearchSettings):
    """Search where and how to train: layers, components, kinds, rates; the best, over seeds.

    python jobs/search.py --out runs/study
    python jobs/search.py --data runs/maths --num_trials 24 --out runs/study \\
        --space '{adapter: [lora, steering], learning_rate: {low: 0.001, high: 0.1, log: true}}'
    python jobs/search.py --lm ./model --data runs/maths --space space.yaml --out runs/study

    Trials run side by side, one a core or GPU, and are ended early where others are ahead. A run
    that was killed goes on with the same line, and trains no finished trial again. Every search
    holds the base as it is and a LoRA by default; the best are trained again with other seeds and
    judged on rows that chose nothing.
    """

    out: OutputPath
    """Folder or URL of the study."""


def main(config: Config) -> None:
    """Search, and say what is best."""
    maker = StudyMaker(config, config.out)
    follow(maker.make())
    for warning in maker.manifest.warnings:
        print(f"warning: {warning}")
    print(maker.manifest.extra["summary"])
    print(f"train it: python jobs/finetune.py --config {config.out}/best.yaml --out ...")
    print(f"{config.out}: read {config.out}/report.html")


if __name__ == "__main__":
    sys.exit(run_job(main, Config))
