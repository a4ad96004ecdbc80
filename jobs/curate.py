#!/usr/bin/env python
"""From one sentence to the conversations that teach it, with the reason for every row."""

import sys

from sae_ray.artifacts import require_empty
from sae_ray.config import OutputPath, run_job
from sae_ray.curate.index import FeatureIndex
from sae_ray.curate.request import Request
from sae_ray.curate.settings import IndexSettings
from sae_ray.distributed.indexes import ensure_index
from sae_ray.distributed.progress import watch
from sae_ray.explain.curation import Curator
from sae_ray.explain.prompt import refine


class Config(IndexSettings, Request):
    """From one sentence to the conversations that teach it, with the reason for every row.

    python jobs/curate.py --task "Solve maths word problems" --out runs/maths
    python jobs/curate.py --task "..." --index runs/maths-index --keep a,b --drop c --out runs/two
    python jobs/curate.py --task "..." --pool chats.jsonl --lm ./model --sae ./sae --out runs/mine

    Look at report.html in the output folder: it shows rows to judge and composes the next command.
    """

    out: OutputPath
    """Folder or URL of the selection."""
    index: OutputPath | None = None
    """Index of the pool: used if it is there, made there if not. Default: OUT-index."""
    labels: str | None = None
    """The SAE's labels: a label file, or a file or folder of Neuronpedia's explanations; a path or
    URL. Default: labels.json in or beside its folder."""
    strict: bool = False
    """Exit with 3 if the selection abstained."""
    interactive: bool = False
    """Keep the process and go on judging rows at a prompt."""


def main(config: Config) -> int:
    """Index the pool if need be, curate, and say where the result is."""
    path = config.index or f"{config.out.rstrip('/')}-index"
    watch(ensure_index(config, path))
    curator = Curator(FeatureIndex(path, config.lm, config.sae), config.labels)
    request = Request.model_validate(config.model_dump(include=set(Request.model_fields)))
    if config.interactive:
        require_empty(config.out)
        if (request := refine(curator, request, input, print)) is None:
            return 0
    manifest = curator.curate(request, config.out, {"strict": True} if config.strict else None)
    for warning in manifest.warnings:
        print(f"warning: {warning}")
    counts = manifest.extra
    print(
        f"{config.out}: {counts['num_rows']:,} rows ({counts['num_rejected']:,} of the pool "
        f"rejected); read {config.out}/report.html"
    )
    return 3 if config.strict and manifest.extra["abstained"] else 0


if __name__ == "__main__":
    sys.exit(run_job(main, Config))
