"""Telling: what an explanation found, in a few lines for a terminal."""

import json
from collections.abc import Callable, Iterator

from sae_ray.artifacts import open_artifact, read_file
from sae_ray.errors import ConfigError
from sae_ray.explain.adapter import KIND, Explaining, ExplainSettings, Progress

_NUM_TOLD = 5


def why(expert: str, path: str, follow: Callable[[Iterator[Progress]], None]) -> Iterator[str]:
    """Explain an expert by a few latents, and yield what came of it.

    Where it cannot be, since it holds out too few rows say, that is told in place of it.

    Args:
        expert: its folder.
        path: the folder of the explanation.
        follow: runs a work to its end.

    Raises:
        SaeRayError: there is no such expert, or its files are not what they were.
    """
    few = ExplainSettings(num_top=10, num_drawn=4, audit_rows=24, num_answers=2)
    try:
        follow(Explaining(few, expert, path).run())
    except ConfigError as error:
        yield f"   not explained: {error}"
        return
    yield from told(path)


def told(path: str) -> Iterator[str]:
    """Yield what to know before trusting an explanation, its summary, and the latents behind it.

    Latents are those that were verified, strongest first; where there are none the summary says so.

    Args:
        path: of a finished explanation.
    """
    manifest = open_artifact(path, KIND)
    yield from (f"warning: {one}" for one in manifest.warnings)
    yield str(manifest.extra["summary"])
    found = json.loads(read_file(f"{path}/explanation.json"))["latents"]
    for one in [latent for latent in found if latent["verified"]][:_NUM_TOLD]:
        yield f"   latent {one['latent']}, {one['label']}: alone {one['share']:.0%} of the change"
