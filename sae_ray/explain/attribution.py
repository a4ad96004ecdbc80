"""Attribution: which latents' edits did it, by integrated gradients along the adapter's own path.

    A_i = 1/N sum_k  d m / d c_i  at c = (k + 1/2)/N

with m what is looked at (`dial.py`) and c how far every edit is turned up. The scores add up to
m(tuned) - m(base) but for the completeness gap, which is always told. Slopes at the trained point
alone would add up to nothing: training has made them 0. The slope at c = 0, one backward pass,
screens.

A score is beyond chance if it is steadier over batches of rows than that of any latent is, in 95 %
of draws, when each batch is given a random sign: what has no direction adds up to nothing.
Source: Sundararajan et al. 2017 (integrated gradients); midpoints and this path are ours.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int64

from sae_ray.explain.dial import Dial, Dials, Piece, Unit

MAX_GAP = 0.05
"""Of the whole effect: beyond this more points are taken, and then it is told."""
_NUM_POINTS = 8
_FINER = 3
"""Three times as many midpoints hold the ones that are there."""
_MAX_POINTS = 72
_NUM_BATCHES = 32
"""At least so many have a sign of their own: of few, all fall the same way too often."""
_NUM_DRAWS = 500
_CHANCE = 0.05


@dataclasses.dataclass(frozen=True)
class Attribution:
    """What each latent's edit contributes to the change on some rows, in nats of all of them."""

    scores: Dials
    spread: Dials
    """Root of the sum of squares of what each batch of rows adds to a score."""
    effect: float
    """m(tuned) - m(base), exact."""
    num_units: int
    num_points: int
    chance: float
    """Size of a score in spreads that any of all latents reaches in 5 % of draws by chance."""

    @property
    def gap(self) -> float:
        """Return the share of the effect by which the scores do not add up to it."""
        missing = abs(float(self.scores.sum()) - self.effect)
        return missing / abs(self.effect) if self.effect else float(missing > 0)

    @property
    def order(self) -> Int64[np.ndarray, " latents"]:
        """Return latents from what contributed most to the change to what opposed it most."""
        sign = -1.0 if self.effect < 0 else 1.0
        return np.argsort(-sign * self.scores, kind="stable").astype(np.int64)

    @property
    def beyond_chance(self) -> Bool[np.ndarray, " latents"]:
        """Return which scores are larger than chance makes any."""
        return np.abs(self.scores) > self.chance * self.spread


def attribute(dial: Dial, units: Sequence[Unit], *, max_gap: float = MAX_GAP) -> Attribution:
    """Attribute the change on some rows to latents; take more points while the gap is too wide.

    Args:
        dial: the tuned model.
        units: rows or pairs that were not trained on.
        max_gap: share of the effect up to which the scores may fail to add up to it.
    """
    ones = np.ones(dial.num_latents, dtype=np.float32)
    effect = float((dial.looks(units, ones) - dial.looks(units, 0 * ones)).sum())
    num, sums = _NUM_POINTS, _slopes(dial, units, _midpoints(_NUM_POINTS))
    while True:
        by_batch = sums / num
        spread = np.sqrt(np.square(by_batch).sum(0))
        chance = _chance(by_batch, spread)
        found = Attribution(by_batch.sum(0), spread, effect, len(units), num, chance)
        if found.gap <= max_gap or num * _FINER > _MAX_POINTS:
            return found
        known, num = set(_midpoints(num)), num * _FINER
        sums += _slopes(dial, units, [t for t in _midpoints(num) if t not in known])


def screen(dial: Dial, units: Sequence[Unit]) -> Dials:
    """Return what each latent's edit would do first of all: slopes at c = 0, one backward pass."""
    return _slopes(dial, units, [0.0]).sum(0)


def pushes(dial: Dial, units: Sequence[Unit]) -> Float[np.ndarray, "units latents"]:
    """Return how hard each row pushes each latent's edit up at the start, where c = 0.

    Of rows that were trained on, it says which of them asked for a latent, without training again.
    """
    pieces = [Piece((unit,), points=(0.0,)) for unit in units]
    return np.stack(dial.ask(pieces)).astype(np.float32)


def overlap(one: Attribution, other: Attribution, num: int = 50) -> float:
    """Return the Jaccard index of two attributions' first latents: of two seeds, say."""
    first, second = set(one.order[:num].tolist()), set(other.order[:num].tolist())
    return len(first & second) / len(first | second)


def _midpoints(num: int) -> list[float]:
    # Rounded, so that those of three times as many are found again.
    return [round((k + 0.5) / num, 12) for k in range(num)]


def _slopes(
    dial: Dial, units: Sequence[Unit], points: Sequence[float]
) -> Float[np.ndarray, "batches latents"]:
    """Return the slope in each dial, a row for each batch, summed over points of the path."""
    # Batches are those of all units, so that it does not matter how many processes answer.
    batches = dial.batches(units, _NUM_BATCHES)
    path = tuple(points)
    pieces = [Piece(tuple(units[i] for i in batch), points=path) for batch in batches]
    return np.stack(dial.ask(pieces))


def _chance(by_batch: Float[np.ndarray, "batches latents"], spread: Dials) -> float:
    """Return the 95th percentile of the steadiest score when batches have random signs."""
    rng = np.random.default_rng(0)
    steady = by_batch / np.maximum(spread, 1e-30)
    signs = rng.choice([-1.0, 1.0], size=(_NUM_DRAWS, len(by_batch)))
    return float(np.quantile([np.abs(some @ steady).max() for some in signs], 1 - _CHANCE))
