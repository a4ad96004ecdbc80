"""How well sentences become selections: arms x domains x wordings, against a hidden column.

Precision at 500 is hits among the first 500 over min(500, positives): an empty place is a miss.
Cells come one by one; `summarise` gives means with intervals by bootstrap over domains, and wins
and losses against BM25 of the same sentence. The hidden column is read here and nowhere else.
"""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import yaml
from jaxtyping import Bool, Float32, Int64

from sae_ray.curate.baselines import (
    DenseText,
    HashedNgrams,
    bm25_scores,
    length_matched_scores,
    longest_scores,
    mona_scores,
    random_scores,
    rds_scores,
    rm3_scores,
    top,
)
from sae_ray.curate.block import IndexBlock
from sae_ray.curate.index import FeatureIndex
from sae_ray.curate.profile import Profile, build_profile
from sae_ray.curate.refine import rows_to_show
from sae_ray.curate.score import ScorerName, Scores, score_pool
from sae_ray.curate.select import candidates_needed, select

BUDGET = 500
ROUNDS = 3
TICKS = 5
"""Rows that the oracle keeps at most in a round, and rows that it drops at most."""
NUM_EXAMPLES = 20
REFERENCE = "bm25"


@dataclasses.dataclass(frozen=True)
class Description:
    """One sentence for one domain."""

    domain: str
    split: str
    """`tune`: the defaults were fixed on it; `report`; `fresh`: looked at once, at the end."""
    number: int
    text: str


@dataclasses.dataclass(frozen=True)
class Cell:
    """What one arm made of one sentence."""

    arm: str
    domain: str
    split: str
    number: int
    precision: float
    abstained: bool = False


@dataclasses.dataclass(frozen=True)
class Summary:
    """One arm over all cells of a split."""

    arm: str
    split: str
    precision: float
    low: float
    high: float
    """95 % interval by bootstrap over domains."""
    difference: float
    difference_low: float
    difference_high: float
    """The same of the difference to BM25."""
    wins: int
    losses: int
    num_cells: int


@dataclasses.dataclass(frozen=True)
class _Run:
    """The default at work on one sentence."""

    profile: Profile
    scores: Scores
    rows: Int64[np.ndarray, " n"]


@dataclasses.dataclass(frozen=True)
class _Fitted:
    """What some arms were fitted on the pool, each None where its arms are left out."""

    random_index: FeatureIndex | None
    texts: DenseText | None
    ngrams: HashedNgrams | None
    final_states: tuple[np.ndarray, Mapping[str, np.ndarray]] | None


class ResidentIndex(FeatureIndex):
    """An index whose blocks stay in memory: an evaluation reads them hundreds of times."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._resident = list(super().blocks(means_only=True))

    def blocks(
        self, *, means_only: bool = False, only: Bool[np.ndarray, " d_sae"] | None = None
    ) -> Iterator[IndexBlock]:
        """Return all rows again, from memory where means are enough."""
        yield from self._resident if means_only else super().blocks(only=only)


def read_descriptions(text: str, part: str = "domains") -> list[Description]:
    """Read the YAML file of descriptions: part -> domain -> split -> sentences."""
    return [
        Description(domain, split, number, sentence)
        for domain, splits in yaml.safe_load(text)[part].items()
        for split, sentences in splits.items()
        for number, sentence in enumerate(sentences)
    ]


def precision_at(
    rows: Int64[np.ndarray, " n"], relevant: Bool[np.ndarray, " num_rows"], k: int = BUDGET
) -> float:
    """Return hits among the first k rows over min(k, positives)."""
    return float(relevant[rows[:k]].sum() / min(k, int(relevant.sum())))


def run_quality(
    index: FeatureIndex,
    random_index: FeatureIndex | None,
    truth: Sequence[str],
    descriptions: Iterable[Description],
    *,
    texts: DenseText | None = None,
    ngrams: HashedNgrams | None = None,
    final_states: tuple[Float32[np.ndarray, "num_rows d"], Mapping[str, np.ndarray]] | None = None,
    budget: int = BUDGET,
    refine: bool = True,
) -> Iterator[Cell]:
    """Run every arm on every description.

    Args:
        index: the pool's index (`ResidentIndex` where there are many descriptions).
        random_index: the same pool through a frozen random SAE.
        truth: the hidden column, for every row.
        descriptions: the sentences.
        texts: LSA of the pool, for its two arms.
        ngrams: n-grams of the pool, for DSIR.
        final_states: RDS+ embeddings of the pool and, by sentence, of the descriptions.
        budget: k of precision at k.
        refine: run the refine loop and the arm with given rows, too.
    """
    column = np.asarray(truth)
    assert len(column) == index.num_rows
    others: dict[str, Profile] = {}
    fitted = _Fitted(random_index, texts, ngrams, final_states)
    for number, one in enumerate(descriptions):
        relevant = column == one.domain
        assert relevant.any(), f"no row of domain {one.domain!r}"
        run = _default(index, one.text, budget)
        yield _cell(one, "default", run.rows, relevant, budget, run.profile.abstained)
        for arm, rows in _arms(index, one, run, fitted, budget, number):
            yield _cell(one, arm, rows, relevant, budget)
        for arm, rows in _controls(index, one, run, others, budget, number):
            yield _cell(one, arm, rows, relevant, budget)
        if refine:
            for arm, rows in _person(index, one, run, relevant, budget, number):
                yield _cell(one, arm, rows, relevant, budget)


def summarise(
    cells: Iterable[Cell], *, num_draws: int = 2000, seed: int = 0, tie: float = 1e-9
) -> list[Summary]:
    """Return every arm's mean with its interval, by split, best first within a split."""
    table: defaultdict[tuple[str, str], dict[tuple[str, int], float]] = defaultdict(dict)
    for cell in cells:
        table[cell.split, cell.arm][cell.domain, cell.number] = cell.precision
    summaries = [
        _summary(split, arm, mine, table[split, REFERENCE], num_draws, seed, tie)
        for (split, arm), mine in table.items()
    ]
    return sorted(summaries, key=lambda one: (one.split, -one.precision, one.arm))


def abstentions(
    cells: Iterable[Cell], arm: str = "default", right: float = 0.5
) -> dict[str, dict[str, int]]:
    """Count by split: right or wrong (precision of 0.5 or more), and abstained or sure."""
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for cell in cells:
        if cell.arm == arm:
            verdict = "right" if cell.precision >= right else "wrong"
            counts[cell.split][f"{verdict}, {'abstained' if cell.abstained else 'sure'}"] += 1
    return {split: dict(sorted(count.items())) for split, count in counts.items()}


def _summary(
    split: str,
    arm: str,
    mine: Mapping[tuple[str, int], float],
    reference: Mapping[tuple[str, int], float],
    num_draws: int,
    seed: int,
    tie: float,
) -> Summary:
    domains = sorted({domain for domain, _ in mine})
    keys = sorted(mine.keys() & reference.keys())
    gaps = {key: mine[key] - reference[key] for key in keys}

    def by_domain(values: Mapping[tuple[str, int], float]) -> np.ndarray:
        sums = [[v for (d, _), v in values.items() if d == domain] for domain in domains]
        return np.array([np.mean(one) if one else np.nan for one in sums])

    draws = np.random.default_rng(seed).integers(len(domains), size=(num_draws, len(domains)))
    low, high = np.nanquantile(by_domain(mine)[draws].mean(1), [0.025, 0.975])
    gap = by_domain(gaps)
    gap_low, gap_high = np.nanquantile(gap[draws].mean(1), [0.025, 0.975])
    return Summary(
        arm=arm,
        split=split,
        precision=float(np.mean(list(mine.values()))),
        low=float(low),
        high=float(high),
        difference=float(np.mean(list(gaps.values()))),
        difference_low=float(gap_low),
        difference_high=float(gap_high),
        wins=sum(value > tie for value in gaps.values()),
        losses=sum(value < -tie for value in gaps.values()),
        num_cells=len(mine),
    )


def _cell(
    one: Description,
    arm: str,
    rows: np.ndarray,
    relevant: np.ndarray,
    budget: int,
    abstained: bool = False,
) -> Cell:
    precision = precision_at(rows, relevant, budget)
    return Cell(arm, one.domain, one.split, one.number, precision, abstained)


def _arms(
    index: FeatureIndex,
    one: Description,
    run: _Run,
    fitted: _Fitted,
    budget: int,
    seed: int,
) -> Iterator[tuple[str, np.ndarray]]:
    """Run what needs the sentence alone."""
    yield "fused", run.scores.order(budget)
    by_score: tuple[ScorerName, ...] = (
        "latents",
        "hidden",
        "sum_topk",
        "jaccard",
        "cosine",
    )
    for scorer in by_score:
        yield scorer, score_pool(index, run.profile, scorer, num_candidates=1).order(budget)
    if fitted.random_index is not None:
        frozen = _default(fitted.random_index, one.text, budget)
        yield "random_sae", frozen.rows
        found = score_pool(fitted.random_index, frozen.profile, "latents", num_candidates=1)
        yield "random_sae_latents", found.order(budget)
    bm25 = bm25_scores(index, one.text)
    yield "bm25", top(bm25, budget)
    yield "bm25_rm3", top(rm3_scores(index, one.text), budget)
    yield "mona", top(mona_scores(index, index.describe(one.text)), budget)
    if fitted.texts is not None:
        yield "lsa", top(fitted.texts.scores(one.text), budget)
        yield "lsa_bm25_seeded", top(fitted.texts.feedback_scores(bm25), budget)
    if fitted.ngrams is not None:
        yield "dsir", top(fitted.ngrams.scores(bm25, seed), budget)
    if fitted.final_states is not None:
        pool, queries = fitted.final_states
        yield "rds_plus", top(rds_scores(pool, queries[one.text]), budget)
    yield "random", top(random_scores(index.num_rows, seed), budget)
    matched = length_matched_scores(index.n_tokens, run.rows, seed)
    yield "random_length_matched", top(matched, budget)
    yield "longest", top(longest_scores(index.n_tokens), budget)


def _default(
    index: FeatureIndex,
    text: str,
    budget: int,
    keep: Sequence[str] = (),
    drop: Sequence[str] = (),
    examples: IndexBlock | None = None,
) -> _Run:
    profile = build_profile(text, index, keep=keep, drop=drop, examples=examples)
    scores = score_pool(index, profile, num_candidates=candidates_needed(budget))
    selection = select(index, profile, scores, min(budget, index.num_rows))
    return _Run(profile, scores, selection.rows)


def _controls(
    index: FeatureIndex,
    one: Description,
    run: _Run,
    others: dict[str, Profile],
    budget: int,
    seed: int,
) -> Iterator[tuple[str, np.ndarray]]:
    """Run what must fail if the profile is what does it: shuffled, and another domain's last."""
    shuffled = shuffle(run.profile, index.d_sae, seed)
    yield (
        "shuffled_profile",
        score_pool(index, shuffled, "latents", num_candidates=1).order(budget),
    )
    other = next((p for domain, p in reversed(others.items()) if domain != one.domain), None)
    if other is not None:
        yield "another_tasks_profile", score_pool(index, other, num_candidates=1).order(budget)
    others.pop(one.domain, None)
    others[one.domain] = run.profile


def shuffle(profile: Profile, d_sae: int, seed: int) -> Profile:
    """Give a profile's weights to latents drawn at random."""
    drawn = np.random.default_rng(seed).permutation(d_sae)
    latents = tuple(
        dataclasses.replace(one, latent=int(other))
        for one, other in zip(profile.latents, drawn, strict=False)
    )
    return dataclasses.replace(profile, latents=latents)


def _person(
    index: FeatureIndex,
    one: Description,
    run: _Run,
    relevant: np.ndarray,
    budget: int,
    seed: int,
) -> Iterator[tuple[str, np.ndarray]]:
    """Run the refine loop with an oracle that ticks, and the arm with given rows."""
    keep: list[str] = []
    drop: list[str] = []
    seen: list[int] = []
    for number in range(1, ROUNDS + 1):
        shown = rows_to_show(index, run.profile, run.scores, seen=seen)
        seen += shown.tolist()
        keep += [index.ids[row] for row in shown if relevant[row]][:TICKS]
        drop += [index.ids[row] for row in shown if not relevant[row]][:TICKS]
        run = _default(index, one.text, budget, keep, drop)
        yield f"refine_{number}", run.rows
    rng = np.random.default_rng(seed)
    given = rng.choice(np.flatnonzero(relevant), NUM_EXAMPLES, replace=False)
    yield (
        f"examples_{NUM_EXAMPLES}",
        _default(index, one.text, budget, examples=index.take(given)).rows,
    )
