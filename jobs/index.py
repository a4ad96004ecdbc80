#!/usr/bin/env python
"""Read a pool of conversations once through a SAE: the index that every later task reuses."""

import sys

from rich import print  # noqa: A004

from sae_ray.artifacts import open_artifact
from sae_ray.config import OutputPath, run_job
from sae_ray.curate.index import KIND
from sae_ray.curate.settings import IndexSettings
from sae_ray.distributed.data import build_index
from sae_ray.distributed.progress import watch


class Config(IndexSettings):
    """Read a pool of conversations once through a SAE; every later task reuses the index.

    python jobs/index.py --out runs/index
    python jobs/index.py --pool chats.jsonl --lm Qwen/Qwen2.5-7B-Instruct --sae ./my_sae --out runs/index
    ray job submit --working-dir . -- python jobs/index.py --pool s3://bucket/chats --out s3://bucket/index

    A run that was killed goes on where it stopped when the same line is given again.
    """

    out: OutputPath
    """Folder or URL of the index."""


def main(config: Config) -> None:
    """Build the index and say where it is."""
    watch(build_index(config, config.out))
    manifest = open_artifact(config.out, KIND)
    counts = manifest.extra
    size = sum(file.bytes for file in manifest.files.values())
    print(
        f"[bold]{config.out}[/bold]: {counts['num_rows']:,} rows, {counts['num_tokens']:,} tokens, "
        f"{counts['num_rejected']} rejected, {size / counts['num_rows']:,.0f} bytes a row"
    )


if __name__ == "__main__":
    sys.exit(run_job(main, Config))
