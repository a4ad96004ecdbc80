#!/usr/bin/env python
"""Look into a registry of experts, add to it, and say which expert of a name is in use."""

import sys
from collections.abc import Sequence
from typing import Literal

from rich.console import Console

from sae_ray.artifacts import read_file
from sae_ray.config import JobConfig, OutputPath, run_job
from sae_ray.errors import ConfigError
from sae_ray.experts.card import ADAPTER, ExpertCard
from sae_ray.experts.registry import ExpertRegistry
from sae_ray.experts.tables import describe, tabulate


class Config(JobConfig):
    """Look into a registry of experts, add to it, and say which expert of a name is in use.

    python jobs/registry.py list --registry runs/experts
    python jobs/registry.py show --registry runs/experts --expert maths
    python jobs/registry.py register --registry runs/experts --folder runs/maths
    python jobs/registry.py activate --registry runs/experts --expert maths@2
    python jobs/registry.py retire --registry runs/experts --expert maths@1 --reason "bad rows"

    The action comes first. `show` reads every file of the expert again and refuses changed ones.
    """

    action: Literal["list", "show", "register", "activate", "retire"] = "list"
    """What to do; the first word of the line."""
    registry: OutputPath
    """Folder or URL of the registry."""
    expert: str | None = None
    """Expert: its id or the beginning of it, its name (the active one), or name@version."""
    folder: str | None = None
    """For `register`: the output folder of a finetune job."""
    reason: str | None = None
    """For `retire`: why; recorded."""
    force_reason: str | None = None
    """For `activate`: why an expert is used although it does not beat its base; recorded."""


def main(config: Config) -> None:
    """Do one thing with the registry, and show what is there."""
    registry = ExpertRegistry(config.registry)
    match config.action:
        case "list":
            Console().print(tabulate(registry.experts()))
            return
        case "register":
            folder = needed(config.folder, "folder", config.action).rstrip("/")
            place = f"{folder}/card.json"
            card = ExpertCard.decode(read_file(place), place)
            expert = registry.register(card, f"{folder}/{ADAPTER}")
        case "show":
            expert = registry.verify(needed(config.expert, "expert", config.action))
        case "activate":
            name = needed(config.expert, "expert", config.action)
            expert = registry.activate(name, force_reason=config.force_reason)
        case "retire":
            expert = registry.retire(needed(config.expert, "expert", config.action), config.reason)
    Console().print(describe(expert), highlight=False)


def needed(value: str | None, name: str, action: str) -> str:
    """Return a setting that an action cannot do without."""
    if value is None:
        raise ConfigError(f"--{name} is missing: `{action}` needs it; see --help")
    return value


def arguments(argv: Sequence[str]) -> list[str]:
    """Let the action stand first, as a word of its own."""
    word = argv[:1] and not argv[0].startswith("-")
    return ["--action", *argv] if word else list(argv)


if __name__ == "__main__":
    sys.exit(run_job(main, Config, arguments(sys.argv[1:])))
