"""Verification: what turning latents off and on really does, on rows that did not rank them.

    left out    m(1) - m(1 - e_i)    what is lost without latent i alone
    added in    m(e_i) - m(0)        what latent i does alone
    keep k      m(first k) - m(0)    of the whole effect
    remove k    m(1) - m(all but the first k)

A latent is verified where both of the first two have the sign of its score, beyond intervals by
bootstrap over rows that hold in 95 % for all latents looked at together (Bonferroni). Curves stand
beside those of three other orders: at random, by the length of what is learnt, and at random among
latents as dense.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int64

from sae_ray.explain.attribution import Attribution
from sae_ray.explain.dial import Dial, Dials, Unit

_RESAMPLES = 10_000
_CHANCE = 0.05
_ENOUGH = 0.8
"""Share of the effect at which curves are compared."""
Order = Int64[np.ndarray, " latents"]


@dataclasses.dataclass(frozen=True)
class Change:
    """Nats a row by which something changes what is looked at, with its interval."""

    mean: float
    low: float
    high: float

    def has_sign(self, sign: float) -> bool:
        """Say whether it is of this sign beyond its interval."""
        return self.low > 0 if sign > 0 else self.high < 0


@dataclasses.dataclass(frozen=True)
class Checked:
    """One latent's score, held against what it does."""

    number: int
    """Among the latents of all sites."""
    score: float
    """Nats a row."""
    left_out: Change
    added_in: Change

    @property
    def is_verified(self) -> bool:
        """Say whether leaving it out and adding it in both bear the score out."""
        return bool(self.score) and all(
            one.has_sign(self.score) for one in (self.left_out, self.added_in)
        )


@dataclasses.dataclass(frozen=True)
class Curve:
    """Shares of the effect by how many latents of an order are kept, or removed."""

    order: str
    counts: list[int]
    kept: list[float]
    removed: list[float]

    @property
    def num_enough(self) -> int | None:
        """Return how many latents, kept alone, have 80 % of the effect; None if never."""
        pairs = zip(self.counts, self.kept, strict=True)
        return next((count for count, share in pairs if share >= _ENOUGH), None)


@dataclasses.dataclass(frozen=True)
class Verification:
    """All checks of an attribution."""

    effect: Change
    """m(tuned) - m(base) on these rows, with a 95 % interval."""
    kept_by_verified: float
    """Share of it that is there with the verified latents alone."""
    top: list[Checked]
    drawn: list[Checked]
    """Drawn at random among the others."""
    curves: list[Curve]

    @property
    def verified(self) -> list[Checked]:
        """Return the latents that bear out their part in the change, strongest first.

        None of a change that is none beyond its interval, and none that opposes it.
        """
        if self.effect.low <= 0 <= self.effect.high:
            return []
        return [one for one in self.top if one.is_verified and one.score * self.effect.mean > 0]

    def agreement(self, what: str) -> float:
        """Return the correlation of scores with `left_out` or `added_in`, over all checked."""
        both = [(one.score, getattr(one, what).mean) for one in (*self.top, *self.drawn)]
        scores, changes = np.array(both).T
        if len(both) < 3 or scores.std() == 0 or changes.std() == 0:
            return 0.0
        return float(np.corrcoef(scores, changes)[0, 1])

    def to_json(self) -> dict[str, Any]:
        """Return it in plain values."""
        return {
            **dataclasses.asdict(self),
            "verified": [one.number for one in self.verified],
            "agreement": {name: self.agreement(name) for name in ("left_out", "added_in")},
        }


def verify(
    dial: Dial,
    units: Sequence[Unit],
    attribution: Attribution,
    *,
    num_top: int = 20,
    num_drawn: int = 20,
    density: Dials | None = None,
    seed: int = 0,
) -> Iterator[tuple[int, int, Verification | None]]:
    """Check an attribution; yield how far it is, and the result at the end.

    Args:
        dial: the tuned model.
        units: rows that had no part in the attribution.
        attribution: what is checked.
        num_top: latents checked from the top of its order.
        num_drawn: latents checked of those below.
        density: share of tokens at which each latent is on, for the density-matched order.
        seed: of the draws.
    """
    rng, total = np.random.default_rng(seed), dial.num_latents
    top = attribution.order[:num_top]
    rest = attribution.order[num_top:]
    drawn = rng.permutation(rest)[:num_drawn]
    orders = dict(_orders(dial, attribution, density, rng))
    counts = _counts(total)
    num_steps, done = 2 + 2 * len(top) + 2 * len(drawn) + 2 * len(orders) * len(counts), 0

    look = functools.partial(_look, dial, units)
    whole, base = look(on=False), look(on=True)
    done += 2
    together = max(1, len(top) + len(drawn))
    checked: list[Checked] = []
    for number in (*top.tolist(), *drawn.tolist()):
        yield done, num_steps, None
        score = float(attribution.scores[number]) / attribution.num_units
        left_out = _change(whole - look(number, on=False), together)
        added_in = _change(look(number, on=True) - base, together)
        checked.append(Checked(number, score, left_out, added_in))
        done += 2
    effect = float((whole - base).sum()) or 1e-30
    curves: list[Curve] = []
    for name, order in orders.items():
        kept, removed = list[float](), list[float]()
        for count in counts:
            yield done, num_steps, None
            kept.append(float((look(order[:count], on=True) - base).sum()) / effect)
            removed.append(float((whole - look(order[:count], on=False)).sum()) / effect)
            done += 2
        curves.append(Curve(name, counts, kept, removed))
    result = Verification(
        _change(whole - base), 0.0, checked[: len(top)], checked[len(top) :], curves
    )
    if mine := [one.number for one in result.verified]:
        kept = float((look(*mine, on=True) - base).sum()) / effect
        result = dataclasses.replace(result, kept_by_verified=kept)
    yield num_steps, num_steps, result


def _look(
    dial: Dial, units: Sequence[Unit], *numbers: int | np.ndarray, on: bool
) -> Float[np.ndarray, " units"]:
    """Look with these latents alone turned on, or off."""
    dials = np.full(dial.num_latents, 0.0 if on else 1.0, dtype=np.float32)
    for one in numbers:
        dials[one] = 1.0 if on else 0.0
    return dial.looks(units, dials)


def _orders(
    dial: Dial, attribution: Attribution, density: Dials | None, rng: np.random.Generator
) -> Iterator[tuple[str, Order]]:
    yield "attribution", attribution.order
    yield "size of what is learnt", np.argsort(-dial.sizes(), kind="stable").astype(np.int64)
    yield "random", rng.permutation(dial.num_latents).astype(np.int64)
    if density is not None:
        yield "random, as dense", _as_dense(attribution.order, density, rng)


def _as_dense(order: Order, density: Dials, rng: np.random.Generator) -> Order:
    """Return an order in which each place holds a random latent about as dense as there."""
    by_density = np.argsort(density, kind="stable")
    rank = np.empty(len(order), dtype=np.int64)
    rank[by_density] = np.arange(len(order))
    # Ranks are shaken by a twentieth of all, and each latent is used once.
    shaken = rank + rng.uniform(-1, 1, len(order)) * max(1.0, len(order) / 20)
    stand_in = np.empty(len(order), dtype=np.int64)
    stand_in[by_density] = np.argsort(shaken, kind="stable")
    return stand_in[order]


def _counts(total: int) -> list[int]:
    """Return 1, 2, 4, ... up to all latents."""
    counts = [1]
    while counts[-1] * 2 < total:
        counts.append(counts[-1] * 2)
    return [*counts, total] if total > 1 else counts


def _change(values: Float[np.ndarray, " units"], together: int = 1) -> Change:
    """Return the mean, with an interval that holds in 95 % for so many of them together."""
    draws = np.random.default_rng(0).integers(len(values), size=(_RESAMPLES, len(values)))
    tail = 100 * _CHANCE / 2 / together
    low, high = np.percentile(values[draws].mean(1), (tail, 100 - tail))
    return Change(float(values.mean()), float(low), float(high))
