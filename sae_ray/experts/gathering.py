"""Gathering: from the experts in use of a registry, and other conversations, to their router."""

from collections.abc import Sequence

import numpy as np
from rich.table import Table
from rich.text import Text

from sae_ray.curate.block import IndexBlock
from sae_ray.curate.sources import EMBEDDED, fingerprint, locate_source
from sae_ray.errors import ConfigError, RegistryError
from sae_ray.experts.fitting import Kind
from sae_ray.experts.prototypes import Eyes, draw_prompts, prototypes_of
from sae_ray.experts.registry import ExpertRegistry
from sae_ray.experts.router import Router
from sae_ray.sae.labels import labels_of


def gather(
    registry: ExpertRegistry,
    background: str | None = None,
    *,
    lm: str,
    sae: str,
    labels: str | None = None,
    kind: Kind = "knn",
    num_background: int = 1000,
    seed: int = 0,
) -> tuple[Router, IndexBlock]:
    """Fit a router over the experts in use; return it with background prompts it has not seen.

    Args:
        registry: where they are.
        background: conversations that none of them should answer; without it, for the embedded
            base alone, the embedded pool, of which what looks like an expert's own is set aside.
        lm: the base of all of them.
        sae: of that model.
        labels: what its latents stand for; see `sae_ray.sae.labels.labels_of`.
        kind: how the router decides.
        num_background: prompts drawn of the background to fit on; a quarter more is held out.
        seed: of the draw.

    Raises:
        ConfigError: there is no background, and the base is not the embedded one.
        RegistryError: there is no expert in use, or one cannot be told from its files and data.
        ModelError: the labels are not there, or are another SAE's.
    """
    if background is None and fingerprint("lm", lm) != fingerprint("lm", EMBEDDED):
        raise ConfigError(
            f"--background is missing: for the embedded model the embedded pool stands in, which "
            f"says nothing of what {lm} is asked; give conversations that no expert should answer"
        )
    names = labels_of(locate_source("sae", sae), labels)
    eyes = Eyes.open(lm, sae)
    known = {
        one.id: (one.card.name, one.card.description, prototypes_of(one, registry.path, eyes))
        for one in registry.active()
    }
    source = background or locate_source("pool", EMBEDDED)
    prompts = eyes.read(draw_prompts(source, num_background + num_background // 4, seed=seed))
    num_held = len(prompts) // 5
    seen, held = (
        prompts.take(rows) for rows in np.split(np.arange(len(prompts)), [len(prompts) - num_held])
    )
    router = Router.fit(eyes, known, seen, kind=kind, labels=names, mixed=background is None)
    return router, held


def sources_of(registry: ExpertRegistry, lm: str | None, sae: str | None) -> tuple[str, str]:
    """Return base and SAE: those given, or those that the cards of the experts in use name.

    Raises:
        RegistryError: there is no expert in use.
        ConfigError: they name none, or several.
    """
    cards = [one.card for one in registry.active()]
    if not cards:
        raise RegistryError(
            f"the registry {registry.path} holds no expert in use: a router needs one or more; "
            "train one with jobs/finetune.py, or activate one with jobs/registry.py"
        )
    lm = lm or _only("lm", [card.base for card in cards])
    read_with = [str(card.prototypes["sae"]) for card in cards if card.prototypes]
    return lm, sae or (EMBEDDED if lm == EMBEDDED else _only("sae", read_with))


def tabulate(router: Router, held: IndexBlock) -> Table:
    """Return a row an expert: its prompts, and how many of a held-out background it would take."""
    scores = router.scores(held)
    taken = (scores >= 0) & (scores >= scores.max(1, keepdims=True))
    table = Table("expert", "id", "task", "prompts", "held-out background taken")
    for one, share in zip(router.experts, taken.mean(0), strict=True):
        name, task = Text(one.name), Text(one.description)
        table.add_row(name, one.id, task, str(len(one.units)), f"{share:.1%}")
    kept = f"{1 - taken.any(1).mean():.1%} of {len(held):,} stay"
    table.add_row("base", "", "", "", kept, style="dim")
    return table


def _only(role: str, names: Sequence[str]) -> str:
    if len(set(names)) == 1:
        return names[0]
    found = ", ".join(sorted(set(names))) or "none"
    raise ConfigError(
        f"the experts in use name {len(set(names))} sources of --{role} ({found}): a router needs "
        f"one; give --{role}"
    )
