import dataclasses
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from sae_ray.curate import select as module
from sae_ray.curate.duplicates import SHINGLE_WORDS, grams
from sae_ray.curate.evidence import ProfileSettings
from sae_ray.curate.profile import Profile, build_profile
from sae_ray.curate.score import Scores, concepts_on, score_pool
from sae_ray.curate.select import COVERAGE, Quota, Selection, SelectorName, select
from tests.sae_ray.curate.planted import NUM_ROWS, Planted

TASK = "Bake bread in the oven from dough and flour"
WORDS_ALONE = ProfileSettings(description_weight=0.0)
THRESHOLD = 0.9
SELECTORS: tuple[SelectorName, ...] = ("greedy", "topk", "round_robin")

pools = settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@dataclasses.dataclass(frozen=True, repr=False)
class World:
    """A pool of many near-copies, a profile over it, and what is true of its rows."""

    planted: Planted
    profile: Profile
    alike: np.ndarray
    """Which rows nearly copy which, from comparing each with each."""

    def scores(self, seed: int, num_candidates: int) -> Scores:
        """Return random scores with many ties, and as few candidates as told."""
        rng = np.random.default_rng(seed)
        total = np.round(rng.normal(size=NUM_ROWS), 1).astype(np.float32)
        best = np.argsort(-total, kind="stable")[:num_candidates]
        candidates = self.planted.index.take(best)
        return Scores(total, {}, np.zeros_like(total), candidates, 0.0)

    def select(self, scores: Scores, budget: int, **how: object) -> Selection:
        """Select from this pool."""
        return select(self.planted.index, self.profile, scores, budget, **how)  # pyright: ignore

    def copies(self, row: int, others: Sequence[int]) -> bool:
        """Say whether a row nearly copies one of others."""
        return bool(self.alike[row, list(others)].any())


@pytest.fixture(scope="module")
def world(repetitive: Planted) -> World:
    profile = build_profile(TASK, repetitive.index, settings=WORDS_ALONE)
    said = repetitive.index.conversations(range(NUM_ROWS))
    held = [grams(one.text(), SHINGLE_WORDS) for one in said]
    place = {gram: i for i, gram in enumerate(sorted(frozenset().union(*held)))}
    has = np.zeros((NUM_ROWS, len(place)), dtype=np.float32)
    for row, mine in enumerate(held):
        has[row, [place[gram] for gram in mine]] = 1
    both = has @ has.T
    either = has.sum(1) + has.sum(1)[:, None] - both
    return World(repetitive, profile, both / either >= THRESHOLD)


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make windows end well inside this pool."""
    monkeypatch.setattr(module, "FIRST_WINDOW", 60)


def columns(seed: int, num_values: int) -> list[str]:
    """Return a column in which values are as uneven as sources are."""
    draws = np.random.default_rng(seed).zipf(1.5, NUM_ROWS) % num_values
    return [f"value {one}" for one in draws]


def may_take(percent: int, num: int) -> int:
    """Return how many of so many rows one value may have, in whole numbers."""
    return -(-percent * num // 100)


@pools
@given(
    seed=st.integers(0, 99),
    selector=st.sampled_from(SELECTORS),
    sizes=st.lists(st.integers(1, 300), min_size=2, max_size=4),
    num_candidates=st.sampled_from([1, 20, 150, NUM_ROWS]),
    near_duplicates=st.sampled_from([THRESHOLD, None]),
    percent=st.sampled_from([None, 7, 30, 55]),
)
def test_a_smaller_budget_keeps_the_first_rows_of_a_larger_one(
    world: World,
    seed: int,
    selector: SelectorName,
    sizes: list[int],
    num_candidates: int,
    near_duplicates: float | None,
    percent: int | None,
) -> None:
    quota = Quota(columns(seed, 9), percent / 100) if percent else None
    how = {"selector": selector, "near_duplicates": near_duplicates, "quota": quota}
    whole = world.select(world.scores(seed, NUM_ROWS), max(sizes), **how)
    tokens = np.cumsum(whole.n_tokens)
    for size in sizes:
        part = world.select(world.scores(seed, num_candidates), size, **how)
        assert_array_equal(part.rows, whole.rows[:size])
        assert part.reasons == whole.reasons[:size]
        few = int(tokens[min(size, len(tokens)) // 2]) + 1
        part = world.select(world.scores(seed, num_candidates), size, budget_tokens=few, **how)
        num_fit = min(size, int((tokens <= few).sum()))
        assert_array_equal(part.rows, whole.rows[:num_fit])


@pools
@given(
    seed=st.integers(0, 99),
    selector=st.sampled_from(SELECTORS),
    percent=st.sampled_from([5, 7, 29, 50, 70, 100]),
    num_values=st.integers(1, 30),
)
def test_every_prefix_holds_the_quota_and_no_copies_and_nothing_that_fits_is_left(
    world: World, seed: int, selector: SelectorName, percent: int, num_values: int
) -> None:
    values = columns(seed, num_values)
    chosen = world.select(
        world.scores(seed, 30), NUM_ROWS, selector=selector, quota=Quota(values, percent / 100)
    )
    rows = chosen.rows.tolist()
    taken: Counter[str] = Counter()
    for num, row in enumerate(rows, start=1):
        taken[values[row]] += 1
        assert taken[values[row]] <= may_take(percent, num)
        assert not world.copies(row, rows[: num - 1])
    assert len(rows) < NUM_ROWS
    room = [r for r in range(NUM_ROWS) if taken[values[r]] < may_take(percent, len(rows) + 1)]
    assert [r for r in room if r not in rows and not world.copies(r, rows)] == []


@pools
@given(
    seed=st.integers(0, 99),
    coverage=st.sampled_from([0.0, COVERAGE, 5.0]),
    percent=st.sampled_from([None, 30]),
    num_candidates=st.sampled_from([1, 100]),
)
def test_lazily_greedy_is_greedy_over_the_whole_pool(
    world: World, seed: int, coverage: float, percent: int | None, num_candidates: int
) -> None:
    scores, budget = world.scores(seed, num_candidates), 40
    values = columns(seed, 9) if percent else [""] * NUM_ROWS
    expected = naively_greedy(world, scores, coverage, values, percent or 100, budget)
    ranking = module._Ranking(world.planted.index, world.profile, scores)
    gate = module._Gate(ranking, THRESHOLD, Quota(values, (percent or 100) / 100))
    order = module._greedy(ranking, gate, coverage)
    assert [int(ranking.rows[next(order)]) for _ in range(budget)] == expected
    if coverage == COVERAGE:
        quota = Quota(values, (percent or 100) / 100)
        assert world.select(scores, budget, quota=quota).rows.tolist() == expected


def naively_greedy(
    world: World,
    scores: Scores,
    coverage: float,
    values: list[str],
    percent: int,
    budget: int,
) -> list[int]:
    """Look at every row of the pool for every place."""
    index = world.planted.index
    rows = scores.order().tolist()
    block = index.take(rows)
    on, weights = concepts_on(block, world.profile, index.stats.on_threshold)
    total = scores.total[rows].astype(float)
    relevance = (total - total[59]) / (total[0] - total[59])
    share = coverage * weights.astype(float) / float(weights.sum())
    chosen: list[int] = []
    for num in range(1, budget + 1):
        held = on[[rows.index(row) for row in chosen]].sum(0)
        gains = relevance + on @ (share * (np.sqrt(held + 1) - np.sqrt(held)))
        for place in np.argsort(-np.round(gains, 9), kind="stable"):
            same = sum(values[row] == values[rows[place]] for row in chosen)
            if same < may_take(percent, num) and not world.copies(rows[place], chosen):
                chosen.append(rows[place])
                break
    return chosen


def test_what_a_row_adds_only_falls_and_coverage_only_grows(world: World) -> None:
    index, scores = world.planted.index, world.scores(3, 200)
    gained: dict[str, np.ndarray] = {}
    for selector in ("greedy", "topk"):
        rows = world.select(scores, 200, selector=selector).rows
        on, weights = concepts_on(index.take(rows), world.profile, index.stats.on_threshold)
        held = np.vstack([np.zeros_like(weights), on.cumsum(0)])
        covered = COVERAGE * np.sqrt(held) @ weights.astype(float) / float(weights.sum())
        total = np.sort(scores.total)[::-1].astype(float)
        relevance = (scores.total[rows] - total[59]) / (total[0] - total[59])
        gained[selector] = relevance + np.diff(covered)
        assert (np.diff(covered) >= 0).all()
    assert (np.diff(gained["greedy"]) <= 1e-6).all()
    assert gained["greedy"].sum() > gained["topk"].sum()


def test_topk_without_copies_is_the_order_of_scores(world: World) -> None:
    scores = world.scores(5, 10)
    kept: list[int] = []
    for row in scores.order().tolist():
        if not world.copies(row, kept):
            kept.append(row)
    chosen = world.select(scores, 100, selector="topk")
    assert chosen.rows.tolist() == kept[:100]
    last = scores.order().tolist().index(kept[99])
    assert chosen.num_near_duplicates == last + 1 - 100
    freely = world.select(scores, 100, selector="topk", near_duplicates=None)
    assert_array_equal(freely.rows, scores.order(100))


def test_concepts_take_turns_within_their_window(world: World) -> None:
    index, scores = world.planted.index, world.scores(8, 50)
    rows = world.select(scores, 90, selector="round_robin", near_duplicates=None).rows.tolist()
    ranked = scores.order().tolist()
    on, weights = concepts_on(index.take(ranked), world.profile, index.stats.on_threshold)
    turns = [*np.argsort(-weights, kind="stable"), None]
    expected: list[int] = []
    while len(expected) < 90:
        for group in turns:
            window = ranked if group is None else ranked[: 60 + 2 * len(expected)]
            free = (i for i, row in enumerate(window) if row not in expected)
            found = next((i for i in free if group is None or on[i, group]), None)
            expected += [] if found is None else [ranked[found]]
    assert rows == expected[:90]


def test_a_quota_gives_way_to_other_values_and_says_for_how_many_rows(world: World) -> None:
    scores = world.scores(4, 40)
    best = set(scores.order(500).tolist())
    values = ["common" if row in best else "rare" for row in range(NUM_ROWS)]
    how = {"selector": "topk", "near_duplicates": None}
    chosen = world.select(scores, 100, quota=Quota(values, 0.75), **how)
    assert Counter(values[row] for row in chosen.rows.tolist()) == {"common": 75, "rare": 25}
    assert chosen.num_over_quota == 25
    assert world.select(scores, 100, quota=Quota(values, 1.0), **how).num_over_quota == 0


def test_rows_come_with_their_own_scores_lengths_and_reasons(planted: Planted) -> None:
    profile = build_profile(TASK, planted.index, settings=WORDS_ALONE)
    few, many = (score_pool(planted.index, profile, num_candidates=n) for n in (3, 400))
    one, two = (select(planted.index, profile, scores, 50) for scores in (few, many))
    for chosen in (one, two):
        assert chosen.ids == [planted.index.ids[row] for row in chosen.rows]
        assert_array_equal(chosen.scores, many.total[chosen.rows])
        assert_array_equal(chosen.n_tokens, planted.index.n_tokens[chosen.rows].sum(1))
        assert all(chosen.reasons)
    assert_array_equal(one.rows, two.rows)
    assert one.reasons == two.reasons


def test_a_budget_of_the_whole_pool_keeps_all_but_copies(world: World) -> None:
    scores = world.scores(0, 100)
    assert sorted(world.select(scores, NUM_ROWS, near_duplicates=None).rows) == list(
        range(NUM_ROWS)
    )
    chosen = world.select(scores, NUM_ROWS)
    assert len(chosen.rows) + chosen.num_near_duplicates == NUM_ROWS


@pytest.mark.parametrize("selector", ["greedy", "topk", "round_robin"])
def test_a_dropped_row_is_never_selected(world: World, selector: SelectorName) -> None:
    index = world.planted.index
    drop = world.select(world.scores(5, 10), 30).ids
    profile = build_profile(TASK, index, drop=drop, settings=WORDS_ALONE)
    scores = score_pool(index, profile)
    assert set(index.ids[row] for row in scores.order(200)) & set(drop)
    chosen = select(index, profile, scores, 200, selector=selector)
    assert len(chosen.ids) == 200
    assert not set(chosen.ids) & set(drop)
