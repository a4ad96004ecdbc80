"""Score: every row of a pool against a profile, in one streaming pass.

    latents   Σ_g w_g [a latent of group g is on]
    hidden    cosine of the mean hidden state with the profile's direction
    lexical   the description's words, fading as a person gives rows
    fused     0.5 z(latents) + z(hidden) + 0.3 / (1 + given) z(lexical)

z is taken over the background rows, so that a row's score does not wait for the others. Of every
row a few numbers are kept, and whole blocks only of the best candidates. By name there are also
`sum_topk`, `jaccard`, `max` and `cosine`, for comparison with what others do.
"""

import dataclasses
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64

from sae_ray.curate.block import IndexBlock
from sae_ray.curate.evidence import lexical_evidence
from sae_ray.curate.index import FeatureIndex
from sae_ray.curate.profile import Profile
from sae_ray.curate.space import HiddenSpace

ScorerName = Literal["fused", "latents", "hidden", "sum_topk", "jaccard", "max", "cosine"]

LATENT_WEIGHT = 0.5
LEXICAL_WEIGHT = 0.3
TOP_LATENTS = 32
"""Latents that `sum_topk` adds up."""
_DECIMALS = 5
"""Scores are rounded, so that ties are ties and rows break them, whatever the number of threads."""


@dataclasses.dataclass(frozen=True)
class Scores:
    """How well each row of the pool fits a profile."""

    total: Float32[np.ndarray, " num_rows"]
    """What rows are ranked by; higher is better, ties go to the earlier row."""
    parts: dict[str, Float32[np.ndarray, " num_rows"]]
    """Standardised parts of the score, by name."""
    lexical: Float32[np.ndarray, " num_rows"]
    """What the description's words say of each row, before it is standardised."""
    candidates: IndexBlock
    """The best rows, best first, with the entries of the profile's latents."""
    length_correlation: float
    """Rank correlation of score and length over an even sample of the pool."""

    def order(self, num: int | None = None) -> Int64[np.ndarray, " n"]:
        """Return rows from best to worst."""
        return np.argsort(-self.total, kind="stable")[:num].astype(np.int64)

    def carried(self, rows: Int64[np.ndarray, " n"]) -> dict[str, float]:
        """Return the share of each part in what lifts these rows above the pool's middle.

        A part that does not lift them carries nothing; all do where nothing does.
        """
        lifts = {name: max(float(part[rows].mean()), 0.0) for name, part in self.parts.items()}
        total = sum(lifts.values())
        return {name: lift / total if total else 0.0 for name, lift in lifts.items()}


@dataclasses.dataclass(frozen=True)
class _Lookup:
    """A profile's latents as arrays over all latents."""

    group: Int64[np.ndarray, " d_sae"]
    """-1 where a latent is not in the profile."""
    group_weights: Float32[np.ndarray, " groups"]
    prototype: Float32[np.ndarray, " d_sae"]
    weights: Float32[np.ndarray, " d_sae"]
    thresholds: Float32[np.ndarray, " d_sae"]


def score_pool(
    index: FeatureIndex,
    profile: Profile,
    scorer: ScorerName = "fused",
    *,
    num_candidates: int = 2000,
) -> Scores:
    """Score every row; keep the best candidates whole.

    Args:
        index: the pool's index.
        profile: the task.
        scorer: which score.
        num_candidates: rows to keep whole, for selecting and for showing.
    """
    space, lookup = index.space, _lookup(profile, index.stats.on_threshold)
    names = {"latents": LATENT_WEIGHT, "hidden": 1.0} if scorer == "fused" else {scorer: 1.0}
    scales = {
        name: _Scale.fit(_raw(name, index.background, space, profile, lookup), weight)
        for name, weight in names.items()
    }
    evidence = lexical_evidence(index, profile.task)
    words = _lexical(evidence, profile) if scorer == "fused" else np.zeros_like(evidence)
    best = _Best(num_candidates)
    parts: dict[str, list[np.ndarray]] = {name: [] for name in names}
    totals: list[np.ndarray] = []
    # The norm of cosine is over all latents; any other score reads those of the profile alone.
    only = None if scorer == "cosine" else latents_of(profile, index.d_sae)
    for block in index.blocks(means_only=scorer != "max", only=only):
        total = words[block.rows]
        for name in names:
            parts[name].append(scales[name](_raw(name, block, space, profile, lookup)))
            total = total + parts[name][-1]
        totals.append(np.round(total, _DECIMALS))
        best.add(block, totals[-1])
    joined = {name: np.concatenate(part) for name, part in parts.items()}
    if scorer == "fused":
        joined["lexical"] = words
    return Scores(np.concatenate(totals), joined, evidence, best.block(), best.length_correlation())


def contributions(
    block: IndexBlock, profile: Profile, on_threshold: Float32[np.ndarray, " d_sae"], top: int = 5
) -> list[list[tuple[int, float]]]:
    """Return the latents that earned each row its place, with their share of its latent score.

    Of a group of near-duplicates the one that is strongest in the row speaks. Where none of the
    profile's latents is on, as in a row that its words or its direction brought in, those that are
    above zero speak.
    """
    lookup = _lookup(profile, on_threshold)
    rows, latents, means = _entries(block, lookup, only_on=False)
    on = means > lookup.thresholds[latents]
    has_some = np.bincount(rows, on, minlength=len(block)) > 0
    speaks = on | ~has_some[rows]
    rows, latents, means = rows[speaks], latents[speaks], means[speaks]
    groups = lookup.group[latents]
    order = np.lexsort((latents, -means, groups, rows))
    first = np.ones(len(order), dtype=bool)
    first[1:] = (np.diff(rows[order]) != 0) | (np.diff(groups[order]) != 0)
    found: list[list[tuple[int, float]]] = [[] for _ in range(len(block))]
    for entry in order[first]:
        weight = float(lookup.group_weights[groups[entry]])
        found[rows[entry]].append((int(latents[entry]), weight))
    for i, one in enumerate(found):
        total = sum(weight for _, weight in one) or 1.0
        one = sorted(one, key=lambda pair: (-pair[1], pair[0]))[:top]
        found[i] = [(latent, weight / total) for latent, weight in one]
    return found


def latents_of(profile: Profile, d_sae: int) -> Bool[np.ndarray, " d_sae"]:
    """Return which latents a profile holds."""
    held = np.zeros(d_sae, dtype=bool)
    held[[one.latent for one in profile.latents]] = True
    return held


def concepts_on(
    block: IndexBlock, profile: Profile, on_threshold: Float32[np.ndarray, " d_sae"]
) -> tuple[Float32[np.ndarray, "n groups"], Float32[np.ndarray, " groups"]]:
    """Return which of a profile's concepts are on in which rows, and the concepts' weights."""
    lookup = _lookup(profile, on_threshold)
    return _active(block, lookup), lookup.group_weights


@dataclasses.dataclass(frozen=True)
class _Scale:
    """Centre and scale of a part over the background, with its weight.

    Length is left in: on real pools it tells tasks apart, and taking out of each part what a cubic
    in log length explains of it cost five points of precision.
    """

    mean: float
    deviation: float

    @classmethod
    def fit(cls, values: np.ndarray, weight: float) -> "_Scale":
        exact = values.astype(np.float64)
        return cls(float(exact.mean()), (float(exact.std()) or 1.0) / weight)

    def __call__(self, values: np.ndarray) -> Float32[np.ndarray, " n"]:
        return ((values.astype(np.float64) - self.mean) / self.deviation).astype(np.float32)


class _Best:
    """The best rows seen so far, as blocks; ties go to the earlier row."""

    def __init__(self, num: int) -> None:
        self.num = num
        self.blocks: list[IndexBlock] = []
        self.scores = np.zeros(0, dtype=np.float32)
        self.floor = -np.inf
        self.sample: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, block: IndexBlock, scores: Float32[np.ndarray, " n"]) -> None:
        self.sample.append((scores[::8], block.n_tokens.sum(1)[::8]))
        here = np.flatnonzero(scores > self.floor)
        # Within a block no more than `num` can be among the best.
        here = np.sort(here[np.argsort(-scores[here], kind="stable")[: self.num]])
        if len(here):
            self.blocks.append(block.take(here))
            self.scores = np.concatenate([self.scores, scores[here]])
        if len(self.scores) > 2 * self.num:
            self._prune()

    def block(self) -> IndexBlock:
        self._prune()
        best = IndexBlock.concatenate(self.blocks)
        return best.take(np.argsort(-self.scores, kind="stable"))

    def length_correlation(self) -> float:
        """Return the rank correlation of score and length over an even sample of rows."""
        scores = np.concatenate([one for one, _ in self.sample])
        lengths = np.concatenate([one for _, one in self.sample])
        if len(scores) < 3 or scores.std() == 0 or lengths.std() == 0:
            return 0.0
        return float(np.corrcoef(_mean_ranks(scores), _mean_ranks(lengths))[0, 1])

    def _prune(self) -> None:
        joined = IndexBlock.concatenate(self.blocks)
        best = np.sort(np.argsort(-self.scores, kind="stable")[: self.num])
        self.blocks, self.scores = [joined.take(best)], self.scores[best]
        if len(self.scores) == self.num:
            self.floor = float(self.scores.min())


def _mean_ranks(values: np.ndarray) -> Float64[np.ndarray, " n"]:
    """Rank values, ties sharing the mean of their ranks: scipy.stats takes 2 s to import for it."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[which]


def _lookup(profile: Profile, thresholds: Float32[np.ndarray, " d_sae"]) -> _Lookup:
    d_sae = len(thresholds)
    group = np.full(d_sae, -1, dtype=np.int64)
    weights, prototype = np.zeros(d_sae, np.float32), np.zeros(d_sae, np.float32)
    num_groups = max((one.group for one in profile.latents), default=-1) + 1
    group_weights = np.zeros(num_groups, dtype=np.float32)
    for one in profile.latents:
        group[one.latent], weights[one.latent] = one.group, one.weight
        prototype[one.latent] = one.prototype
        group_weights[one.group] = max(group_weights[one.group], one.weight)
    return _Lookup(group, group_weights, prototype, weights, thresholds)


def _lexical(
    evidence: Float32[np.ndarray, " num_rows"], profile: Profile
) -> Float32[np.ndarray, " num_rows"]:
    weight = LEXICAL_WEIGHT / (1 + profile.num_given)
    return (weight * (evidence - evidence.mean()) / (evidence.std() or 1.0)).astype(np.float32)


def _raw(
    name: str, block: IndexBlock, space: HiddenSpace, profile: Profile, lookup: _Lookup
) -> np.ndarray:
    if name == "hidden":
        return space.project(block) @ np.asarray(profile.direction, dtype=np.float32)
    if name == "latents":
        return _active(block, lookup) @ lookup.group_weights
    if name == "max":
        return block.pooled("max") @ lookup.weights
    rows, latents, means = _entries(block, lookup, only_on=False)
    share = block.n_tokens / np.maximum(block.n_tokens.sum(1, keepdims=True), 1)
    if name == "sum_topk":
        top = np.argsort(-lookup.weights, kind="stable")[:TOP_LATENTS]
        counted = np.isin(latents, top) * means * block.n_tokens.sum(1)[rows]
        return np.bincount(rows, counted, minlength=len(block))
    if name == "jaccard":
        both = np.bincount(rows, np.minimum(means, lookup.prototype[latents]), minlength=len(block))
        either = (share * block.l1).sum(1) + lookup.prototype.sum() - both
        return both / np.maximum(either, 1e-9)
    assert name == "cosine", name
    whole = block.pooled("mean")
    norm = np.sqrt(whole.multiply(whole).sum(axis=1))
    return (whole @ lookup.prototype) / np.maximum(np.asarray(norm).ravel(), 1e-9)


def _active(block: IndexBlock, lookup: _Lookup) -> Float32[np.ndarray, "n groups"]:
    rows, latents, _ = _entries(block, lookup)
    active = np.zeros((len(block), len(lookup.group_weights)), dtype=np.float32)
    active[rows, lookup.group[latents]] = 1
    return active


def _entries(
    block: IndexBlock, lookup: _Lookup, *, only_on: bool = True
) -> tuple[Int64[np.ndarray, " e"], np.ndarray, Float32[np.ndarray, " e"]]:
    """Return row, latent and row mean of the profile's latents: a tenth of all entries, or less."""
    entries = np.flatnonzero((lookup.group >= 0)[block.latents])
    rows = np.searchsorted(block.indptr, entries, side="right") - 1
    share = block.n_tokens / np.maximum(block.n_tokens.sum(1, keepdims=True), 1)
    means = (block.means[entries] * share[rows].astype(np.float32)).sum(1)
    latents = block.latents[entries]
    if only_on:
        on = means > lookup.thresholds[latents]
        rows, latents, means = rows[on], latents[on], means[on]
    return rows.astype(np.int64), latents, means
