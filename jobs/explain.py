#!/usr/bin/env python
"""What an expert's training changed, checked; or who answers a prompt, and why; both in words."""

import sys

from pydantic import Field

from sae_ray.artifacts import open_artifact
from sae_ray.config import OutputPath, run_job
from sae_ray.distributed.dials import dials_over
from sae_ray.distributed.progress import follow
from sae_ray.errors import ConfigError
from sae_ray.explain import route
from sae_ray.explain.adapter import Explaining, ExplainSettings
from sae_ray.explain.telling import told

OF_ROUTES = {"prompt", "top_k"}
OF_EXPERTS = set(ExplainSettings.model_fields) - {"lm", "sae"}


class Config(ExplainSettings):
    """What an expert's training changed, checked; or who answers a prompt, and why; both in words.

    python jobs/explain.py --expert runs/maths-expert --out runs/maths-why
    python jobs/explain.py --expert runs/lora-expert --sae ./sae --out runs/lora-why
    python jobs/explain.py --router runs/router --prompt "Sort 9, 2, 5" --out runs/sort-why

    Latents are ranked on one half of the expert's held-out rows and checked on the other, each by
    itself; the summary names those alone that bear their scores out. Of adapters that change
    weights (lora, subspace) it tells how the latents drift. Of a route it tells what the router
    decided by: the score of every expert, and the latents that spoke, where they were read.
    """

    expert: OutputPath | None = None
    """Folder or URL of an expert, as jobs/finetune.py makes it; or else --router is given."""
    router: OutputPath | None = None
    """Folder or URL of a router, as jobs/fit_router.py makes it; or else --expert is given."""
    prompt: str | list[str] | None = None
    """What is asked of the router: one prompt, commas and all, or a JSON list of several."""
    top_k: int = Field(default=1, ge=1)
    """Experts at most that a router lets answer together."""
    out: OutputPath
    """Folder or URL of the explanation."""


def main(config: Config) -> None:
    """Explain the expert or the routes, and say what came of it."""
    if config.expert is not None and config.router is None:
        refuse(config, OF_ROUTES, "--router")
        follow(Explaining(config, config.expert, config.out, dials_over).run())
        print(*told(config.out), sep="\n")
    elif config.router is not None and config.expert is None:
        refuse(config, OF_EXPERTS, "--expert")
        explain_routes(config, config.router)
        print(open_artifact(config.out, route.KIND).extra["summary"])
    else:
        given = "neither is" if config.expert is None else "both are"
        raise ConfigError(f"{given} given: give either --expert, or --router and --prompt")
    print(f"{config.out}: read {config.out}/report.html")


def explain_routes(config: Config, router: str) -> None:
    """Explain the routes of the prompts."""
    prompts = [config.prompt] if isinstance(config.prompt, str) else config.prompt or []
    if len(config.sae or [""]) != 1:
        raise ConfigError(f"--sae names {len(config.sae or [])}, and a router has one: give that")
    (sae,) = config.sae or [None]
    lm, top_k = config.lm, config.top_k
    follow(route.explain_routes(router, prompts, config.out, lm=lm, sae=sae, top_k=top_k))


def refuse(config: Config, others: set[str], flag: str) -> None:
    """Refuse settings of the other kind of explanation, rather than not heed them."""
    if given := sorted(others & config.model_fields_set):
        names = ", ".join(f"--{name}" for name in given)
        raise ConfigError(f"{names} given without {flag}, which it is for: leave it out")


if __name__ == "__main__":
    sys.exit(run_job(main, Config))
