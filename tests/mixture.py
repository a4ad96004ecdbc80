"""A mixture made by hand: two experts on a tiny model, and a router fitted to prompts for each."""

import dataclasses
import random
from pathlib import Path

from sae_ray.adapters.attach import AdapterSpec
from sae_ray.experts.prototypes import Eyes
from sae_ray.experts.registry import ExpertRegistry
from sae_ray.experts.router import Router
from tests.made_experts import add_expert

WORDS = {
    "sums": "add seven plus nine minus four total equals",
    "rivers": "river bridge boat water shore flood dam",
    "": "song piano voice market letter weather garden",
}
"""What each expert is asked about, and what nobody knows."""


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Where it lies."""

    registry: str
    router: str
    ids: dict[str, str]
    """Ids of the experts by name."""


def prompts(about: str, num: int, *, seed: int = 0) -> list[str]:
    """Return prompts of an expert's kind, or of nobody's."""
    rng = random.Random(f"{about}-{seed}")
    words = WORDS[about].split()
    return [" ".join(rng.choices(words, k=rng.randint(6, 12))) for _ in range(num)]


def make_mixture(folder: Path, lm: Path, sae: Path) -> Mixture:
    """Make experts with random weights, and fit a router over them."""
    registry = ExpertRegistry(str(folder / "registry"))
    eyes, known, ids = Eyes.open(str(lm), str(sae)), {}, {}
    for seed, name in enumerate(("sums", "rivers")):
        spec = AdapterSpec(kind="lora", r=2)
        ids[name] = add_expert(registry, name, spec, lm=str(lm), seed=seed).id
        known[ids[name]] = (name, name, eyes.read(prompts(name, 60)))
    labels = {latent: f"latent {latent}" for latent in range(64)}
    router = Router.fit(eyes, known, eyes.read(prompts("", 200)), labels=labels)
    router.save(str(folder / "router"), str(lm), str(sae))
    return Mixture(registry.path, str(folder / "router"), ids)
