"""Following: a router kept as its registry is, without being fitted again."""

import logging

from sae_ray.errors import ConfigError, RegistryError, RequestError
from sae_ray.experts.prototypes import prototypes_of
from sae_ray.experts.registry import Expert, ExpertRegistry
from sae_ray.experts.residents import require_servable
from sae_ray.experts.router import Routed, Router

logger = logging.getLogger(__name__)


class Follower:
    """A router that is replaced as experts come into use and go out of it.

    What cannot be followed is said once: an expert that prompts cannot be compared with is not
    routed to, and a router that is trained on its experts (logistic) stays as it is. It may go on
    naming an expert that was retired: whoever asks it must look at who can be asked.
    """

    def __init__(self, router: Router, registry: ExpertRegistry) -> None:
        self.router = router
        """As of the last look; never changed, only replaced."""
        self._registry = registry
        self._told: set[tuple[str, str]] = set()

    def look(self) -> None:
        """Look into the registry, and let the router know who is in use.

        Raises:
            RegistryError, ArtifactError: it cannot be read.
        """
        active = {one.id: one for one in self._registry.active()}
        known = {one.id for one in self.router.experts}
        router = self.router
        # New ones first: a router of nobody cannot be.
        for expert in (one for id, one in active.items() if id not in known):
            router = self._added(router, expert)
        for gone in (one for one in self.router.experts if one.id not in active):
            router = self._retired(router, gone)
        self.router = router

    def _added(self, router: Router, expert: Expert) -> Router:
        card = expert.card
        try:
            require_servable(card)
            prototypes = prototypes_of(expert, self._registry.path, router.eyes)
            return router.add(expert.id, card.name, card.description, prototypes)
        except (ConfigError, RegistryError, RequestError) as error:
            self._tell("nothing is routed to", f"{card.name}@{expert.version}", str(error))
            return router

    def _retired(self, router: Router, gone: Routed) -> Router:
        try:
            return router.retire(gone.id)
        except (ConfigError, RegistryError) as error:
            who = f"{gone.name} ({gone.id})"
            self._tell("the base answers in place of the retired", who, str(error))
            return router

    def _tell(self, what: str, who: str, why: str) -> None:
        if (what, who) not in self._told:
            self._told.add((what, who))
            logger.warning("%s %s: %s", what, who, why)
