"""Agreement: a service's base, router and experts belong together, or it does not start."""

import logging
import os
from collections.abc import Sequence

from sae_ray.artifacts import Manifest, open_artifact
from sae_ray.curate.sources import EMBEDDED, Role, describe_source, fingerprint, locate_model
from sae_ray.errors import ConfigError
from sae_ray.experts.card import ExpertCard
from sae_ray.experts.registry import ExpertRegistry
from sae_ray.experts.router import KIND
from sae_ray.experts.settings import ServeSettings

logger = logging.getLogger(__name__)


def agreed(settings: ServeSettings) -> ServeSettings:
    """Return settings that name their base, and whose local paths hold in any working directory.

    The base is the one given, or else the router's, or else that of all experts in use.

    Raises:
        ConfigError: router or experts were made with another base, or nothing says which is meant.
        ArtifactError, RegistryError: router or registry cannot be read.
        ModelError: the base cannot be found.
    """
    if settings.router is not None and settings.registry is None:
        raise ConfigError(
            f"--router {settings.router} chooses among experts and there is no --registry of them: "
            "give it, or leave --router out"
        )
    router = None if settings.router is None else open_artifact(settings.router, KIND)
    cards = _cards(settings.registry)
    lm = settings.lm or (router.sources["lm"].name if router is not None else _only_base(cards))
    locate_model(lm)  # says what is wrong with a name that is nobody's
    sha256 = _fingerprint("lm", lm, router)
    if router is not None:
        _require_same("lm", lm, sha256, router, settings)
        if settings.sae is not None:
            found = _fingerprint("sae", settings.sae, router)
            _require_same("sae", settings.sae, found, router, settings)
    if cards and not any(card.base_sha256 == sha256 for card in cards):
        raise ConfigError(
            f"none of the {len(cards)} experts in use in {settings.registry} was trained on {lm} "
            f"(their cards name {_bases(cards)}): give --lm with their base, or another registry"
        )
    return settings.model_copy(update=_absolute(settings.model_copy(update={"lm": lm})))


def _cards(registry: str | None) -> list[ExpertCard]:
    if registry is None:
        return []
    experts = ExpertRegistry(registry).experts()
    active = [one.card for one in experts if one.status == "active"]
    if not active:
        logger.warning("no expert in %s is in use: the base answers until one is", registry)
    return active


def _only_base(cards: Sequence[ExpertCard]) -> str:
    if not cards:
        return EMBEDDED
    if len({card.base_sha256 for card in cards}) == 1:
        return cards[0].base
    raise ConfigError(
        f"the experts in use were trained on several bases ({_bases(cards)}) and one is served: "
        "give --lm, and the experts of the others are left out"
    )


def _bases(cards: Sequence[ExpertCard]) -> str:
    return ", ".join(sorted({card.base for card in cards}))


def _fingerprint(role: Role, name: str, router: Manifest | None) -> str:
    """Return what identifies a source; what has not changed since the fit is not read again."""
    if router is not None:
        stamp = describe_source(role, name).stamp
        if stamp is not None and stamp == router.sources[role].stamp:
            return router.parents[role]
    return fingerprint(role, name)


def _require_same(
    role: Role, name: str, found: str, router: Manifest, settings: ServeSettings
) -> None:
    if found != router.parents[role]:
        raise ConfigError(
            f"--router {settings.router} was fitted with another {role} than {name} holds: give "
            f"--{role} with a copy of {router.sources[role].name}, or fit the router again"
        )


def _absolute(settings: ServeSettings) -> dict[str, str]:
    """Return paths that every replica can use, wherever it was started."""
    paths = settings.model_dump(include={"lm", "registry", "router", "sae", "keys"})
    # A base or SAE may be a published name; everything else is a path or a URL.
    local = {
        name: path
        for name, path in paths.items()
        if path and "://" not in path and (os.path.exists(path) or name not in ("lm", "sae"))
    }
    return paths | {name: os.path.abspath(path) for name, path in local.items()}
