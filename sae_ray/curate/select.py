"""Select: scores and a budget to the rows that are kept, in an order of which every prefix is one.

    greedy       relevance + concave coverage of the profile's concepts, lazily
    topk         by score alone
    round_robin  the profile's concepts take turns, each the best row in which it is on

Each keeps out dropped rows and near-copies of rows already in, and lets rows wait while their value
of the quota's column has its share. A selector goes on through the whole pool and never learns the
budget, which only says where to stop: so budget k is a prefix of budget k + 1, and a selection is
short only where no row of the pool may follow.
"""

import dataclasses
import heapq
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from itertools import islice
from operator import itemgetter
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64

from sae_ray.curate.block import IndexBlock
from sae_ray.curate.duplicates import NEAR_COPY, NearDuplicates
from sae_ray.curate.index import FeatureIndex
from sae_ray.curate.profile import Profile
from sae_ray.curate.score import Scores, concepts_on, contributions, latents_of

SelectorName = Literal["greedy", "topk", "round_robin"]

COVERAGE = 0.1
"""Weight of coverage beside relevance in `greedy`."""
FIRST_WINDOW = 1000
WINDOW_GROWTH = 2
"""A concept's turn in `round_robin` takes a row of the best 1000 + 2 i, where i rows are in."""
_FIRST_TEXTS = 256
_SLACK = 1e-9
"""By how much sums may differ that are added up in another order."""


@dataclasses.dataclass(frozen=True)
class Quota:
    """A cap on how much of any prefix one value of a column may take."""

    values: Sequence[str]
    """The column, for every row of the pool."""
    share: float
    """Above 0, at most 1."""


@dataclasses.dataclass(frozen=True)
class Selection:
    """Rows that were kept, first choice first."""

    rows: Int64[np.ndarray, " n"]
    ids: list[str]
    scores: Float32[np.ndarray, " n"]
    n_tokens: Int64[np.ndarray, " n"]
    reasons: list[list[tuple[int, float]]]
    """For each row the latents that earned it its place, with their share."""
    num_near_duplicates: int
    """Rows that were passed over as near-copies."""
    num_over_quota: int
    """Rows that would have been kept without the quota."""


def candidates_needed(budget_examples: int) -> int:
    """Return how many candidates `score_pool` should keep, so that `select` seldom reads more."""
    return FIRST_WINDOW + WINDOW_GROWTH * budget_examples


def select(
    index: FeatureIndex,
    profile: Profile,
    scores: Scores,
    budget_examples: int,
    budget_tokens: int | None = None,
    *,
    selector: SelectorName = "greedy",
    near_duplicates: float | None = NEAR_COPY,
    quota: Quota | None = None,
) -> Selection:
    """Choose rows within a budget.

    Args:
        index: the pool's index.
        profile: the task.
        scores: of the pool; any number of candidates will do, `candidates_needed` is fastest.
        budget_examples: rows wanted. Fewer are kept where no other row of the pool may follow.
        budget_tokens: content tokens that they may hold together; the first row that does not fit
            ends the selection.
        selector: how rows follow each other.
        near_duplicates: Jaccard of word 5-grams from which a row copies one already in; None lets
            copies in. Two questions about one passage are two rows: they share about 0.85.
        quota: a column whose values may each take only a share.
    """
    ranking = _Ranking(index, profile, scores)

    def run(gate: _Gate) -> list[int]:
        order = islice(_SELECTORS[selector](ranking, gate), budget_examples)
        return _within(budget_tokens, ranking, order)

    gate = _Gate(ranking, near_duplicates, quota)
    chosen = run(gate)
    freely = chosen if quota is None else run(_Gate(ranking, near_duplicates, None))
    kept = ranking.block(chosen)
    return Selection(
        rows=kept.rows,
        ids=kept.ids,
        scores=ranking.total[chosen],
        n_tokens=kept.n_tokens.sum(1).astype(np.int64),
        reasons=contributions(kept, profile, index.stats.on_threshold),
        num_near_duplicates=gate.num_copies,
        num_over_quota=len(set(freely) - set(chosen)),
    )


class _Ranking:
    """The pool from best to worst; a row is known by its place.

    What is asked of the first rows is answered from the scores' candidates; the first question
    about another reads the whole index.
    """

    def __init__(self, index: FeatureIndex, profile: Profile, scores: Scores) -> None:
        self.index, self.profile, self.candidates = index, profile, scores.candidates
        self.rows = scores.order()
        self.total = scores.total[self.rows]
        assert np.array_equal(self.candidates.rows, self.rows[: len(self.candidates)])
        on, self.weights = self._concepts_on(self.candidates)
        self._first = on
        self._texts: list[str] = []
        self.dropped = {seed.row for seed in profile.seeds if seed.channel == "drop"}

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def relevance(self) -> Float64[np.ndarray, " num_rows"]:
        """Scores on a scale of 1 for the best row and 0 for the last of the first window."""
        total = self.total.astype(np.float64)
        last = total[min(FIRST_WINDOW, len(total)) - 1]
        return (total - last) / max(float(total[0] - last), 1e-6)

    def concepts(self, num: int) -> Bool[np.ndarray, "n groups"]:
        """Return which concepts are on in the best rows, so many or more of them."""
        return self._first if num <= len(self._first) else self._all

    def text(self, i: int) -> str:
        """Return what a row says. Many are read at once: they lie all over the pool."""
        while i >= len(self._texts):
            known = len(self._texts)
            more = max(known, len(self.candidates), _FIRST_TEXTS)
            found = self.index.conversations(self.rows[known : known + more])
            self._texts += [one.text() for one in found]
        return self._texts[i]

    def block(self, places: list[int]) -> IndexBlock:
        """Return rows whole."""
        if max(places, default=0) < len(self.candidates):
            return self.candidates.take(places)
        return self.index.take(self.rows[places])

    @cached_property
    def _all(self) -> Bool[np.ndarray, "num_rows groups"]:
        on = np.zeros((len(self), len(self.weights)), dtype=bool)
        held = latents_of(self.profile, self.index.d_sae)
        for block in self.index.blocks(means_only=True, only=held):
            on[block.rows] = self._concepts_on(block)[0]
        return on[self.rows]

    def _concepts_on(
        self, block: IndexBlock
    ) -> tuple[Bool[np.ndarray, "n groups"], Float32[np.ndarray, " groups"]]:
        on, weights = concepts_on(block, self.profile, self.index.stats.on_threshold)
        return on > 0, weights


class _Gate:
    """Lets rows in, unless they copy one that is in or their value has its share."""

    def __init__(
        self, ranking: _Ranking, near_duplicates: float | None, quota: Quota | None
    ) -> None:
        self.num_in = self.num_copies = 0
        self._ranking, self._quota = ranking, quota
        self._taken: Counter[str] = Counter()
        self._seen = NearDuplicates(near_duplicates) if near_duplicates is not None else None

    def value(self, i: int) -> str:
        """Return a row's value of the quota's column."""
        return self._quota.values[int(self._ranking.rows[i])] if self._quota else ""

    def has_room(self, value: str) -> bool:
        """Say whether the next row may have this value."""
        if self._quota is None:
            return True
        # Rounded first: 0.07 * 100 is a little more than 7.
        return self._taken[value] < math.ceil(round(self._quota.share * (self.num_in + 1), 9))

    def admit(self, i: int) -> bool:
        """Let a row in whose value has room; a dropped row or a copy is never asked again."""
        assert self.has_room(self.value(i))
        if int(self._ranking.rows[i]) in self._ranking.dropped:
            return False
        if self._seen is not None and not self._seen.admit(self._ranking.text(i)):
            self.num_copies += 1
            return False
        self._taken[self.value(i)] += 1
        self.num_in += 1
        return True


def _within(budget_tokens: int | None, ranking: _Ranking, order: Iterator[int]) -> list[int]:
    if budget_tokens is None:
        return list(order)
    chosen: list[int] = []
    for i in order:
        budget_tokens -= int(ranking.index.n_tokens[ranking.rows[i]].sum())
        if budget_tokens < 0:
            break
        chosen.append(i)
    return chosen


def _greedy(ranking: _Ranking, gate: _Gate, coverage: float = COVERAGE) -> Iterator[int]:
    """Maximise Σ relevance + coverage Σ_g w_g sqrt(rows in which g is on) / Σ_g w_g, lazily.

    A gain only falls as rows come in. So a row whose stale gain leads is looked at again and, if
    it still leads, is the best of those in the heaps, one for each value of the quota's column; a
    row further down enters only while all concepts together could lift it above the best.
    """
    share = coverage * ranking.weights.astype(np.float64) / max(float(ranking.weights.sum()), 1e-9)
    held = np.zeros(len(share), dtype=np.int64)
    step, limit = share, float(share.sum())
    heaps: defaultdict[str, list[tuple[float, int, int]]] = defaultdict(list)
    entered = 0

    def push(i: int) -> None:
        gain = float(ranking.relevance[i]) + float(step[ranking.concepts(i + 1)[i]].sum())
        heapq.heappush(heaps[gate.value(i)], (-gain, i, gate.num_in))

    while True:
        ready = (heap for value, heap in heaps.items() if heap and gate.has_room(value))
        heap = min(ready, key=itemgetter(0), default=None)
        if heap is not None and heap[0][2] < gate.num_in:
            push(heapq.heappop(heap)[1])
            continue
        best = -heap[0][0] if heap is not None else -math.inf
        if entered < len(ranking) and ranking.relevance[entered] + limit + _SLACK > best:
            push(entered)
            entered += 1
            continue
        if heap is None:
            return
        i = heapq.heappop(heap)[1]
        if gate.admit(i):
            held += ranking.concepts(i + 1)[i]
            step = share / (np.sqrt(held + 1) + np.sqrt(held))  # sqrt(h + 1) - sqrt(h), times w
            limit = float(step.sum())
            yield i


def _round_robin(ranking: _Ranking, gate: _Gate) -> Iterator[int]:
    """Let concepts take turns, the heaviest first, then the best row that is left, whatever is on.

    A concept whose window holds no row for it loses its turn.
    """
    left = np.ones(len(ranking), dtype=bool)

    def best(group: int | None) -> int | None:
        window = len(ranking)
        if group is not None:
            window = min(window, FIRST_WINDOW + WINDOW_GROWTH * gate.num_in)
        here = left[:window]
        if group is not None:
            here = here & ranking.concepts(window)[:window, group]
        places = np.flatnonzero(here).tolist()
        return next((i for i in places if gate.has_room(gate.value(i))), None)

    turns = [*np.argsort(-ranking.weights, kind="stable").tolist(), None]
    before = -1
    while before < gate.num_in:
        before = gate.num_in
        for group in turns:
            while (i := best(group)) is not None:
                left[i] = False
                if gate.admit(i):
                    yield i
                    break


_SELECTORS: dict[SelectorName, Callable[[_Ranking, _Gate], Iterator[int]]] = {
    "greedy": _greedy,
    "topk": partial(_greedy, coverage=0.0),
    "round_robin": _round_robin,
}
