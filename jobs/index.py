#!/usr/bin/env python
"""Read a pool of conversations once through a SAE: the index that every later task reuses."""

import sys

from sae_ray.artifacts import open_artifact
from sae_ray.config import OutputPath, run_job
from sae_ray.curate.index import KIND
from sae_ray.curate.settings import IndexSettings
from sae_ray.distributed.data import build_index
from sae_ray.distributed.progress import watch


class Config(IndexSettings):
    """Read a pool of conversations once through a SAE; every later task reuses the index.

    python jobs/index.py --out runs/index
    python jobs/index.py --pool chats.jsonl --lm ./model --sae ./sae --out runs/index
    ray job submit --working-dir . -- python jobs/index.py --pool s3://b/chats --out s3://b/index

    A run that was killed goes on where it stopped when the same line is given again.
    """

    out: OutputPath
    """Folder or URL of the index."""


def main(config: Config) -> None:
    """Build the index and say where it is."""
    watch(build_index(config, config.out))
    manifest = open_artifact(config.out, KIND)
    for warning in manifest.warnings:
        print(f"warning: {warning}")
    counts = manifest.extra
    print(
        f"{config.out}: {counts['num_rows']:,} rows, {counts['num_tokens']:,} tokens, "
        f"{counts['num_rejected']} rejected, {counts['bytes_per_row']:,} bytes a row"
    )


if __name__ == "__main__":
    sys.exit(run_job(main, Config))
