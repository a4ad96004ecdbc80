#!/usr/bin/env python
"""Train SAEs for an instruct model: many from one forward, each conversation read alone."""

import sys

from sae_ray.artifacts import open_artifact
from sae_ray.config import OutputPath, run_job
from sae_ray.distributed.progress import follow
from sae_ray.distributed.saes import KIND, SAERun
from sae_ray.sae.settings import TrainSettings


class Config(TrainSettings):
    """Train SAEs for an instruct model: many from one forward, each conversation read alone.

    python jobs/train_sae.py --out runs/saes
    python jobs/train_sae.py --lm ./model --data chats.jsonl --archs batchtopk,jumprelu \\
        --hook_points blocks.12.hook_resid_post --widths 16384,65536 --out runs/saes
    ray job submit --working-dir . -- python jobs/train_sae.py --num_workers 8 --out s3://b/saes ...

    Every hook point, architecture, width and seed is one SAE, in a folder that
    sae_lens.SAE.load_from_disk reads, with its quality beside it. A run that was killed goes on
    from its last checkpoint when the same line is given again; a finished one costs nothing.
    """

    out: OutputPath
    """Folder or URL of the SAEs."""


def main(config: Config) -> None:
    """Train the SAEs and say where they are and how good."""
    follow(SAERun(config, config.out).run())
    manifest = open_artifact(config.out, KIND)
    for warning in manifest.warnings:
        print(f"warning: {warning}")
    counts = manifest.extra
    print(
        f"{config.out}: {counts['num_saes']} SAEs trained on {counts['num_tokens']:,} tokens; "
        f"{counts['num_rejected']} of {counts['num_rows']:,} rows rejected, "
        f"{counts['num_repeats']} repeats dropped, {counts['cut_instances']} instances cut; "
        f"read {config.out}/report.html"
    )


if __name__ == "__main__":
    sys.exit(run_job(main, Config))
