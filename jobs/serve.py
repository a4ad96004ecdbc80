#!/usr/bin/env python
"""Serve a base and its experts as one model, spoken to as OpenAI's API, with a page to try it."""

import os
import sys
from pathlib import Path

from sae_ray.config import run_job
from sae_ray.experts.settings import ServeSettings

ROOT = Path(__file__).parents[1]


class Config(ServeSettings):
    """Serve a base and its experts as one model, spoken to as OpenAI's API, with a page to try it.

    python jobs/serve.py --registry runs/experts --router runs/router
    python jobs/serve.py --registry runs/experts --max_rows 8 --port 8080
    python -m serve.keys runs/keys laptop   (makes an API key, for --keys runs/keys)

    Open the printed address for the page; with /v1 behind it, it is the base_url of any OpenAI
    client. It runs until Ctrl-C. On a cluster that runs already: serve deploy serve/config.yaml.
    """


def main(config: Config) -> None:
    """Become the service, for which `serve` is the folder and not this file."""
    given = config.model_dump(mode="json", exclude_unset=True)
    flags = [f"--{name}={value}" for name, value in given.items()]
    elsewhere = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{elsewhere}" if elsewhere else str(ROOT)
    os.execv(sys.executable, [sys.executable, "-m", "serve.running", *flags])


if __name__ == "__main__":
    sys.exit(run_job(main, Config))
