"""Contrast: which latents tell one set of conversations from another, and which of them to trust.

    t_i = (mean_P z̄_i - mean_R z̄_i) / sqrt(s²_P / n_P + s²_R / n_R)

over conversations, z̄ the mean of a latent over a reply; everything from sums, so that sets of any
size cost the same memory. A latent counts where |t| exceeds what the largest |t| of all latents is
in 95 % of random divisions of the same conversations: then the chance of a single false one is 5 %.

With a control set, which shares with the positive one what is not meant (style, topic), the control
takes the place of the reference.
Source: after SAILS, arXiv 2512.23260, whose score is |mean_P - mean_R| (`score="abs_delta"`) or
that over mean |z| (`"rel_delta"`); t, the threshold and the filters are ours.
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float64, Int64

from sae_ray.adapters.pooling import PooledRow
from sae_ray.errors import TaskError

Score = Literal["t", "abs_delta", "rel_delta"]

NUM_DIVISIONS = 100
MIN_ROWS_ON = 10
"""Conversations of one set in which a latent must be on."""
MAX_DENSITY = 0.2
"""Share of tokens at which it may be on, over the retain set, or else the other one."""
MAX_FIRST_SHARE = 0.5
"""Share of its sum that may lie at the first token of conversations."""
MAX_LENGTH_GAP = 0.2
"""Relative difference of mean lengths above which latents must also pass with length held fixed."""
MAX_UNEXPLAINED = 0.5
"""Share of the activations' variance that the SAE may leave unexplained."""
_BLOCK = 64


class Moments:
    """Sums over the conversations of one set, latent by latent, in double precision."""

    def __init__(self, d_sae: int) -> None:
        self.num_rows = self.num_tokens = 0
        self.unexplained = self.spread = 0.0
        self.length = self.length_squares = 0.0
        """Of the natural logarithm of a reply's tokens."""
        self.values = np.zeros((7, d_sae))
        self.sums, self.squares, self.rows_on, self.tokens_on = self.values[:4]
        self.first, self.totals, self.with_length = self.values[4:]

    def add(self, rows: Sequence[PooledRow]) -> Float64[np.ndarray, "rows d_sae"]:
        """Take in rows, and return their mean latents, dense."""
        dense = np.zeros((len(rows), self.values.shape[1]))
        for row, z in zip(rows, dense, strict=True):
            at = row.latents
            z[at] = row.means
            self.rows_on[at] += row.counts > 0
            self.tokens_on[at] += row.counts
            self.first[at] += row.first
            self.totals[at] += row.means.astype(np.float64) * row.num_tokens
            self.num_tokens += row.num_tokens
            self.unexplained += row.unexplained
            self.spread += row.spread
        length = np.log([row.num_tokens for row in rows])
        self.num_rows += len(rows)
        self.length += length.sum()
        self.length_squares += (length**2).sum()
        self.sums += dense.sum(0)
        self.squares += (dense**2).sum(0)
        self.with_length += length @ dense
        return dense

    @property
    def all_rows(self) -> "Sums":
        """Sums over all conversations so far."""
        return Sums(self.num_rows, self.sums, self.squares)

    @property
    def density(self) -> Float64[np.ndarray, " d_sae"]:
        """Share of tokens at which a latent is on."""
        return self.tokens_on / max(1, self.num_tokens)


class Divisions:
    """Sums over random subsets of conversations, each drawn from its id alone."""

    def __init__(self, d_sae: int, share: float, num: int = NUM_DIVISIONS, seed: int = 0) -> None:
        self.share, self.seed = share, seed
        self.counts = np.zeros(num)
        self.sums = np.zeros((num, d_sae))
        self.squares = np.zeros((num, d_sae))

    def add(self, ids: Sequence[str], dense: Float64[np.ndarray, "rows d_sae"]) -> None:
        """Put each row into the subsets that are drawn for it."""
        drawn = np.array([self._draw(one) for one in ids]).T.astype(np.float64)
        self.counts += drawn.sum(1)
        self.sums += drawn @ dense
        self.squares += drawn @ dense**2

    def _draw(self, id: str) -> Bool[np.ndarray, " num"]:
        digest = hashlib.sha256(f"{self.seed} {id}".encode()).digest()[:8]
        rng = np.random.default_rng(int.from_bytes(digest, "little"))
        return rng.random(len(self.counts)) < self.share

    def largest(
        self, both: tuple[Moments, Moments], eligible: Bool[np.ndarray, " d_sae"]
    ) -> Float64[np.ndarray, " num"]:
        """Return the largest |t| of the eligible latents in each division."""
        whole = both[0].all_rows + both[1].all_rows
        largest = np.zeros(len(self.counts))
        for at, count in enumerate(self.counts):
            part = Sums(float(count), self.sums[at], self.squares[at])
            largest[at] = np.abs(welch(part, whole - part)[eligible]).max(initial=0.0)
        return largest


@dataclasses.dataclass(frozen=True, slots=True)
class Sums:
    """What a mean and a variance are made of, latent by latent."""

    num: float | int
    sums: Float64[np.ndarray, " d_sae"]
    squares: Float64[np.ndarray, " d_sae"]

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(self.num + other.num, self.sums + other.sums, self.squares + other.squares)

    def __sub__(self, other: "Sums") -> "Sums":
        return Sums(self.num - other.num, self.sums - other.sums, self.squares - other.squares)

    @property
    def mean(self) -> Float64[np.ndarray, " d_sae"]:
        """Mean over rows."""
        return self.sums / self.num

    @property
    def deviations(self) -> Float64[np.ndarray, " d_sae"]:
        """Sum of squared differences from the mean."""
        return np.maximum(self.squares - self.sums**2 / self.num, 0)

    @property
    def variance(self) -> Float64[np.ndarray, " d_sae"]:
        """Of one row, without bias."""
        return self.deviations / (self.num - 1)


def welch(one: Sums, other: Sums) -> Float64[np.ndarray, " d_sae"]:
    """Return Welch's t of every latent; 0 where nothing varies or there are too few rows."""
    if min(one.num, other.num) < 2:
        return np.zeros_like(one.sums)
    error = one.variance / one.num + other.variance / other.num
    delta = one.mean - other.mean
    return np.divide(delta, np.sqrt(error), out=np.zeros_like(delta), where=error > 0)


@dataclasses.dataclass(frozen=True)
class Contrast:
    """What a comparison of two sets says of every latent."""

    positive: Moments
    against: Moments
    """The control set, or else the reference."""
    reference: Moments
    t: Float64[np.ndarray, " d_sae"]
    t_at_length: Float64[np.ndarray, " d_sae"]
    """With the logarithm of the reply's length held fixed."""
    eligible: Bool[np.ndarray, " d_sae"]
    threshold: float
    """Of |t|; 5 % of random divisions have one latent above it."""
    warnings: tuple[str, ...]

    @property
    def effect(self) -> Float64[np.ndarray, " d_sae"]:
        """Cohen's d."""
        sides = (self.positive.all_rows, self.against.all_rows)
        pooled = sides[0].variance / 2 + sides[1].variance / 2
        delta = sides[0].mean - sides[1].mean
        return np.divide(delta, np.sqrt(pooled), out=np.zeros_like(delta), where=pooled > 0)

    def scores(self, score: Score = "t") -> Float64[np.ndarray, " d_sae"]:
        """Return what latents are ranked by, signed; 0 for those that may not be chosen."""
        sides = (self.positive.all_rows, self.against.all_rows)
        delta = sides[0].mean - sides[1].mean
        if score == "rel_delta":
            # A floor, or the rarest latents win: measured, they are no better than random ones.
            means = np.maximum(sides[0].mean, sides[1].mean)
            delta = delta / np.maximum(means, np.median(means[means > 0]))
        return np.where(self.eligible, self.t if score == "t" else delta, 0.0)

    def select(
        self, k: int | None = None, score: Score = "t", *, k_max: int = 64
    ) -> Int64[np.ndarray, " k"]:
        """Return latents by falling |score|: those above the threshold, or `k` of them.

        Raises:
            TaskError: no latent tells the sets apart.
        """
        scores = np.abs(self.scores(score))
        order = np.argsort(-scores, kind="stable")
        passes = np.abs(self.t) > self.threshold
        if self.lengths_differ:
            passes &= np.abs(self.t_at_length) > self.threshold
        chosen = order[(scores > 0)[order] & (passes[order] | (k is not None))]
        if not len(chosen):
            largest = np.abs(self.t[self.eligible]).max(initial=0.0)
            raise TaskError(
                f"no latent tells {self.positive.num_rows} conversations from "
                f"{self.against.num_rows} (largest |t| {largest:.1f}, needed "
                f"{self.threshold:.1f}): give more conversations, clearer sets, or k"
            )
        return chosen[: k_max if k is None else k].astype(np.int64)

    @property
    def lengths_differ(self) -> bool:
        """Whether replies of one set are longer than those of the other."""
        return _length_gap(self.positive, self.against) > MAX_LENGTH_GAP


def contrast(
    d_sae: int,
    positive: Iterable[PooledRow],
    reference: Iterable[PooledRow],
    *,
    control: Iterable[PooledRow] | None = None,
    retain: Iterable[PooledRow] | None = None,
    share: float,
    seed: int = 0,
) -> Contrast:
    """Compare sets of conversations as they stream by.

    Args:
        d_sae: number of latents.
        positive: what is wanted.
        reference: what it is compared with.
        control: shares with the positive what is not meant; takes the reference's place.
        retain: ordinary conversations, on which a latent may not be dense.
        share: of the positive among the conversations compared, about: the size of random subsets.
        seed: of the random divisions.

    Raises:
        TaskError: a set is too small, or the SAE does not explain its activations.
    """
    divisions = Divisions(d_sae, share, seed=seed)
    sets = {"positive": _gathered(d_sae, positive, divisions)}
    sets["reference"] = _gathered(d_sae, reference, divisions if control is None else None)
    if control is not None:
        sets["control"] = _gathered(d_sae, control, divisions)
    for name, moments in sets.items():
        _require_usable(name, moments)
    pair = (sets["positive"], sets["control" if control is not None else "reference"])
    ordinary = pair[1] if retain is None else _gathered(d_sae, retain, None)
    eligible = _eligible(pair, ordinary)
    largest = divisions.largest(pair, eligible)
    return Contrast(
        positive=pair[0],
        against=pair[1],
        reference=sets["reference"],
        t=welch(pair[0].all_rows, pair[1].all_rows),
        t_at_length=_t_at_length(*pair),
        eligible=eligible,
        threshold=float(np.quantile(largest, 0.95)),
        warnings=_warnings(*pair),
    )


def _gathered(d_sae: int, rows: Iterable[PooledRow], divisions: Divisions | None) -> Moments:
    moments = Moments(d_sae)
    block: list[PooledRow] = []

    def flush() -> None:
        dense = moments.add(block)
        if divisions is not None:
            divisions.add([row.id for row in block], dense)
        block.clear()

    for row in rows:
        block.append(row)
        if len(block) == _BLOCK:
            flush()
    if block:
        flush()
    return moments


def _require_usable(name: str, moments: Moments) -> None:
    if moments.num_rows < MIN_ROWS_ON:
        raise TaskError(
            f"the {name} set has {moments.num_rows} conversations with a reply: at least "
            f"{MIN_ROWS_ON} are needed, and some hundreds are better"
        )
    if moments.unexplained > MAX_UNEXPLAINED * moments.spread:
        share = moments.unexplained / moments.spread
        raise TaskError(
            f"the SAE leaves {share:.0%} of the variance of the {name} set's activations "
            f"unexplained ({MAX_UNEXPLAINED:.0%} allowed): give a SAE of this model, or other text"
        )


def _eligible(pair: tuple[Moments, Moments], ordinary: Moments) -> Bool[np.ndarray, " d_sae"]:
    common = np.maximum(pair[0].rows_on, pair[1].rows_on) >= MIN_ROWS_ON
    first, totals = (getattr(pair[0], n) + getattr(pair[1], n) for n in ("first", "totals"))
    sink = first > MAX_FIRST_SHARE * (first + totals)
    return common & (ordinary.density <= MAX_DENSITY) & ~sink


def _length_gap(one: Moments, other: Moments) -> float:
    lengths = [side.num_tokens / side.num_rows for side in (one, other)]
    return abs(lengths[0] - lengths[1]) / max(lengths)


def _warnings(positive: Moments, against: Moments) -> tuple[str, ...]:
    if (gap := _length_gap(positive, against)) <= MAX_LENGTH_GAP:
        return ()
    lengths = (one.num_tokens / one.num_rows for one in (positive, against))
    return (
        "replies of the two sets differ in length by {:.0%} ({:.0f} and {:.0f} tokens): latents "
        "that only tell long from short are dropped; sets of like length are better".format(
            gap, *lengths
        ),
    )


def _t_at_length(one: Moments, other: Moments) -> Float64[np.ndarray, " d_sae"]:
    """Return t of the difference with log length held fixed (analysis of covariance)."""
    sides = (one, other)
    within = sum(side.length_squares - side.length**2 / side.num_rows for side in sides)
    if within <= 0:  # all of one length
        return welch(one.all_rows, other.all_rows)
    cross = sum(side.with_length - side.length * side.sums / side.num_rows for side in sides)
    gap = one.length / one.num_rows - other.length / other.num_rows
    delta = one.all_rows.mean - other.all_rows.mean - cross / within * gap
    residual = one.all_rows.deviations + other.all_rows.deviations - cross**2 / within
    error = np.maximum(residual, 0) / (one.num_rows + other.num_rows - 3)
    error = error * (1 / one.num_rows + 1 / other.num_rows + gap**2 / within)
    return np.divide(delta, np.sqrt(error), out=np.zeros_like(delta), where=error > 0)
