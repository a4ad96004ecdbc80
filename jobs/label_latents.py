#!/usr/bin/env python
"""Look at where a SAE's latents are on: contexts, statistics and labels, judged or not."""

import sys

from sae_ray.artifacts import open_artifact
from sae_ray.config import OutputPath, run_job
from sae_ray.distributed.progress import follow
from sae_ray.explain.labelling import KIND, Labelling, LabelSettings


class Config(LabelSettings):
    """Look at where a SAE's latents are on: contexts, statistics and labels, judged or not.

    python jobs/label_latents.py --out runs/labels
    python jobs/label_latents.py --lm ./model --sae ./sae --data chats.jsonl --out runs/labels
    python jobs/label_latents.py --judge_url https://host/v1 --judge_model M --out runs/judged

    What a judge will cost is said before it is asked; a run that was stopped asks nothing twice.
    Use the labels with `python jobs/curate.py --labels runs/labels/labels.json ...`; what lies in
    runs/labels/neuronpedia, where they can be mended and scored by others too, is read likewise.
    """

    out: OutputPath
    """Folder or URL of the labels."""


def main(config: Config) -> None:
    """Label the latents and say what came of it."""
    follow(Labelling(config, config.out).run())
    manifest = open_artifact(config.out, KIND)
    for warning in manifest.warnings:
        print(f"warning: {warning}")
    counts = manifest.extra
    print(
        f"{config.out}: {counts['num_labelled']:,} of {counts['num_latents']:,} latents labelled, "
        f"{counts['num_never_on']:,} never on in {counts['num_tokens']:,} tokens "
        f"({counts['num_rejected']} rows rejected); read {config.out}/report.html"
    )


if __name__ == "__main__":
    sys.exit(run_job(main, Config))
