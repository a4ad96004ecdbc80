"""Gathering: from the experts in use of a registry, and other conversations, to their router."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from sae_ray.curate.sources import EMBEDDED, locate_source
from sae_ray.errors import ConfigError, ModelError
from sae_ray.experts.fitting import Kind
from sae_ray.experts.prototypes import Eyes, draw_prompts, prototypes_of
from sae_ray.experts.registry import ExpertRegistry
from sae_ray.experts.router import Router
from sae_ray.sae.labels import read_labels


def gather(
    registry: ExpertRegistry,
    background: str | None = None,
    *,
    lm: str,
    sae: str,
    kind: Kind = "knn",
    num_background: int = 1000,
    seed: int = 0,
) -> Router:
    """Fit a router over the experts in use.

    Args:
        registry: where they are.
        background: conversations that none of them should answer; without it the embedded pool, of
            which what looks like an expert's own is set aside.
        lm: the base of all of them.
        sae: of that model.
        kind: how the router decides.
        num_background: prompts drawn of the background.
        seed: of the draw.

    Raises:
        RegistryError: there is no expert in use, or one cannot be told from its files and data.
    """
    eyes = Eyes.open(lm, sae)
    known = {
        one.id: (one.card.name, one.card.description, prototypes_of(one, registry.path, eyes))
        for one in registry.active()
    }
    source = background or locate_source("pool", EMBEDDED)
    prompts = eyes.read(draw_prompts(source, num_background, seed=seed))
    labels = labels_of(locate_source("sae", sae))
    return Router.fit(eyes, known, prompts, kind=kind, labels=labels, mixed=background is None)


def sources_of(registry: ExpertRegistry, lm: str | None, sae: str | None) -> tuple[str, str]:
    """Return base and SAE: those given, or those that the cards of the experts in use name.

    Raises:
        ConfigError: they name none, or several.
    """
    cards = [one.card for one in registry.active()]
    lm = lm or _only("lm", [card.base for card in cards])
    read_with = [str(card.prototypes["sae"]) for card in cards if card.prototypes]
    return lm, sae or (EMBEDDED if lm == EMBEDDED else _only("sae", read_with))


def labels_of(sae: str) -> Mapping[int, str]:
    """Return what latents stand for, from a file in or beside the SAE's folder, if it has one."""
    for path in (Path(sae) / "labels.json", Path(sae).parent / "labels.json"):
        if path.is_file():
            try:
                return read_labels(path, sae)
            except ModelError:
                continue  # labels of another SAE that lies there too
    return {}


def tabulate(router: Router) -> Table:
    """Return a row an expert: its prompts, and how many of the background it would take."""
    scores = router.fitted.scores(router.background)
    taken = (scores >= 0) & (scores >= scores.max(1, keepdims=True))
    table = Table("expert", "id", "task", "prompts", "background taken")
    for one, share in zip(router.experts, taken.mean(0), strict=True):
        name, task = Text(one.name), Text(one.description)
        table.add_row(name, one.id, task, str(len(one.units)), f"{share:.1%}")
    kept = f"{1 - taken.any(1).mean():.1%} of {len(router.background):,} stay"
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
