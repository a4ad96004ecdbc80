"""Agreement: experts of other seeds, ranked on the same rows, and how alike their latents rank."""

import dataclasses
import itertools
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
from scipy.stats import hypergeom, spearmanr

from sae_ray.adapters.edits import LATENT_KINDS
from sae_ray.adapters.examples import Example, PairExample
from sae_ray.curate.sources import fingerprint
from sae_ray.errors import ConfigError
from sae_ray.experts.card import ExpertCard
from sae_ray.explain.attribution import Attribution, attribute
from sae_ray.explain.dial import Spread, units_of
from sae_ray.explain.tuned import Tuned

_MIN_ROWS = 10
_PERCENTILE = 0.95
Rows = Sequence[Example | PairExample]


@dataclasses.dataclass(frozen=True)
class Contender:
    """An expert whose latents are ranked."""

    path: str
    card: ExpertCard
    tuned: Tuned
    trained: Rows


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How alike two experts rank the same latents, on rows that neither was trained on."""

    one: str
    other: str
    num_rows: int
    num_top: int
    rank_correlation: float
    """Spearman's, of the scores of all latents; 0 where either's are all the same."""
    overlap: float
    """Share of the first latents of one that are among the first of the other."""
    expected: float
    """That share, if each drew its first latents at random."""
    chance: float
    """What it would then exceed in 5 % of draws at most."""

    @classmethod
    def of(
        cls, names: tuple[str, str], found: tuple[Attribution, Attribution], num_top: int
    ) -> "Agreement":
        """Compare two attributions on the same rows."""
        one, other = found
        num, top = len(one.scores), min(num_top, len(one.scores))
        both = set(one.order[:top].tolist()) & set(other.order[:top].tolist())
        flat = not np.ptp(one.scores) or not np.ptp(other.scores)
        rank: Any = 0.0 if flat else spearmanr(one.scores, other.scores).statistic  # pyright: ignore[reportAttributeAccessIssue]
        return cls(
            *names,
            num_rows=one.num_units,
            num_top=top,
            rank_correlation=float(rank),
            overlap=len(both) / top,
            expected=top / num,
            chance=float(hypergeom.ppf(_PERCENTILE, num, top, top)) / top,
        )


def require_alike(
    paths: tuple[str, str],
    cards: tuple[ExpertCard, ExpertCard],
    saes: tuple[Mapping[str, str], Mapping[str, str]],
) -> None:
    """Refuse to compare experts whose latents are not the same, or looked at in the same way.

    Args:
        paths: of both experts.
        cards: their own.
        saes: where the SAE of each hook point lies.

    Raises:
        ConfigError: they have no latents, or differ in base, kind, objective or SAEs.
    """
    if cards[0].adapter not in LATENT_KINDS:
        raise ConfigError(
            f"--others compares scores of latents, of which {paths[0]}, an adapter of kind "
            f"{cards[0].adapter}, has none: leave it out"
        )
    prints = [{point: fingerprint("sae", one) for point, one in mine.items()} for mine in saes]
    facts = {
        "base": [card.base_sha256[:12] for card in cards],
        "kind of adapter": [card.adapter for card in cards],
        "objective": [card.objective for card in cards],
        "hook point": [", ".join(one) for one in prints],
        "SAE": [", ".join(value[:12] for value in one.values()) for one in prints],
    }
    for what, (mine, others) in facts.items():
        if mine != others:
            raise ConfigError(
                f"{paths[1]} has another {what} ({others}) than {paths[0]} ({mine}): their latents "
                "cannot be compared; name with --others experts that differ in their seeds"
            )


def unseen_by(experts: Sequence[Contender], rows: Rows) -> Rows:
    """Return the rows that no expert was trained on, under whatever id.

    Raises:
        ConfigError: too few are left.
    """
    left = list(rows)
    for one in experts:
        known = {row.content for row in one.trained}
        before, left = len(left), [row for row in left if row.content not in known]
        if len(left) < _MIN_ROWS:
            raise ConfigError(
                f"{one.path} was trained on {before - len(left)} of the {before} rows that are to "
                f"be compared on, and of the {len(left)} left {_MIN_ROWS} are needed: name fewer "
                "experts with --others, or train them with a larger --held_out_rows"
            )
    return left


def agreed(
    experts: Sequence[Contender],
    rows: Rows,
    num_top: int,
    workers: Callable[[Tuned], AbstractContextManager[Spread | None]],
) -> Generator[tuple[str, int, int, str], None, list[Agreement]]:
    """Rank the latents of experts on the same rows, one after the other; return every pair's."""
    found: list[Attribution] = []
    places: list[list[tuple[str, int]]] = []
    units = units_of(rows)  # pyright: ignore[reportArgumentType]
    for number, one in enumerate(experts):
        yield "comparing experts", number, len(experts), f"on {len(rows)} rows that none has seen"
        with workers(one.tuned) as spread:
            dial = one.tuned.dial(spread)
            places.append([(str(site.point), int(i)) for site in dial.sites for i in site.latents])
            if places[-1] != places[0]:
                raise ConfigError(
                    f"{one.path} may change other latents than {experts[0].path}: they cannot be "
                    "compared; name with --others experts that differ in their seeds"
                )
            found.append(attribute(dial, units))
    names = [f"{one.card.name} ({one.card.id[:12]})" for one in experts]
    return [
        Agreement.of((names[a], names[b]), (found[a], found[b]), num_top)
        for a, b in itertools.combinations(range(len(experts)), 2)
    ]
