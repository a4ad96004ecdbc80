"""Select: scores and a budget to the rows that are kept, in an order of which every prefix is one.

    greedy       relevance + concave coverage of the profile's concepts, lazily
    topk         by score alone
    round_robin  the profile's concepts take turns, each the best row in which it is on

Each keeps out near-copies of rows already in. Budget k is a prefix of budget k + 1: nothing that
decides the i-th row depends on how many rows are wanted.
"""

import dataclasses
import heapq
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float32, Int64

from sae_ray.curate.duplicates import NearDuplicates
from sae_ray.curate.index import FeatureIndex
from sae_ray.curate.profile import Profile
from sae_ray.curate.score import Scores, concepts_on, contributions
from sae_ray.errors import ConfigError

SelectorName = Literal["greedy", "topk", "round_robin"]

COVERAGE = 0.1
"""Weight of coverage beside relevance in `greedy`."""
FIRST_WINDOW = 1000
WINDOW_GROWTH = 2
"""A selector looks for its i-th row among the best 1000 + 2 i, where there are as many."""

Order = Iterator[int]
"""Positions among the candidates, best first."""


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
    """Rows that were passed over because their value had its share."""


def candidates_needed(budget_examples: int) -> int:
    """Return how many candidates `score_pool` should keep for a budget."""
    return FIRST_WINDOW + WINDOW_GROWTH * budget_examples


def select(
    index: FeatureIndex,
    profile: Profile,
    scores: Scores,
    budget_examples: int,
    budget_tokens: int | None = None,
    *,
    selector: SelectorName = "greedy",
    near_duplicates: float | None = 0.8,
    quota: Quota | None = None,
) -> Selection:
    """Choose rows within a budget.

    Args:
        index: the pool's index.
        profile: the task.
        scores: of the pool, with at least `candidates_needed(budget_examples)` candidates.
        budget_examples: rows wanted. Fewer are kept where the pool holds no more that differ.
        budget_tokens: content tokens that they may hold together; the first row that does not fit
            ends the selection.
        selector: how rows follow each other.
        near_duplicates: Jaccard of word 5-grams from which a row copies one already in; None lets
            copies in.
        quota: a column whose values may each take only a share.

    Raises:
        ConfigError: the budget is not positive, or larger than the pool.
    """
    _check(index, scores, budget_examples, budget_tokens, quota)
    candidates = scores.candidates
    on, weights = concepts_on(candidates, profile, index.stats.on_threshold)
    total = scores.total[candidates.rows]
    lengths = candidates.n_tokens.sum(1)
    gate = _Gate(index, candidates.rows, near_duplicates, quota)
    order = _ORDERS[selector](_relevance(total), on, weights)
    chosen: list[int] = []
    spent = 0
    for i in order:
        if len(chosen) == budget_examples:
            break
        if not gate.admit(i, len(chosen)):
            continue
        spent += int(lengths[i])
        if budget_tokens is not None and spent > budget_tokens:
            break
        chosen.append(i)
    kept = candidates.take(chosen)
    return Selection(
        rows=kept.rows,
        ids=kept.ids,
        scores=total[chosen],
        n_tokens=lengths[chosen].astype(np.int64),
        reasons=contributions(kept, profile, index.stats.on_threshold),
        num_near_duplicates=gate.copies,
        num_over_quota=gate.over_quota,
    )


def _check(
    index: FeatureIndex,
    scores: Scores,
    budget_examples: int,
    budget_tokens: int | None,
    quota: Quota | None,
) -> None:
    for name, value in (("budget_examples", budget_examples), ("budget_tokens", budget_tokens)):
        if value is not None and value < 1:
            raise ConfigError(f"{name}={value}: at least 1 is needed; give a positive number")
    if budget_examples > index.num_rows:
        raise ConfigError(
            f"budget_examples={budget_examples} but the pool holds {index.num_rows} rows: lower "
            "the budget or give a larger pool"
        )
    if quota is not None and not 0 < quota.share <= 1:
        raise ConfigError(f"quota={quota.share}: a share above 0 and at most 1 is needed")
    needed = min(index.num_rows, candidates_needed(budget_examples))
    assert len(scores.candidates) >= needed, "score_pool kept too few candidates for this budget"


def _relevance(total: Float32[np.ndarray, " n"]) -> Float32[np.ndarray, " n"]:
    """Scale scores to 1 for the best and 0 for the last of the first window."""
    last = total[min(FIRST_WINDOW, len(total)) - 1]
    return (total - last) / np.float32(max(float(total[0] - last), 1e-6))


class _Gate:
    """Keeps out near-copies, and values that have had their share."""

    def __init__(
        self,
        index: FeatureIndex,
        rows: Int64[np.ndarray, " n"],
        near_duplicates: float | None,
        quota: Quota | None,
    ) -> None:
        self.rows, self.quota = rows, quota
        self.copies = self.over_quota = 0
        self._taken: Counter[str] = Counter()
        self._seen = NearDuplicates(near_duplicates) if near_duplicates is not None else None
        # All at once: candidates lie all over the pool, and reading a few costs as much as many.
        self._texts = [one.text() for one in index.conversations(rows)] if self._seen else []

    def admit(self, i: int, num_chosen: int) -> bool:
        value = self.quota.values[int(self.rows[i])] if self.quota else ""
        if self.quota and self._taken[value] >= math.ceil(self.quota.share * (num_chosen + 1)):
            self.over_quota += 1
            return False
        if self._seen is not None and not self._seen.admit(self._texts[i]):
            self.copies += 1
            return False
        self._taken[value] += 1
        return True


def _topk(
    relevance: Float32[np.ndarray, " n"],
    on: Float32[np.ndarray, "n groups"],
    weights: Float32[np.ndarray, " groups"],
) -> Order:
    yield from range(len(relevance))


def _greedy(
    relevance: Float32[np.ndarray, " n"],
    on: Float32[np.ndarray, "n groups"],
    weights: Float32[np.ndarray, " groups"],
) -> Order:
    """Maximise Σ relevance + 0.1 Σ_g w_g sqrt(rows in which g is on) / Σ_g w_g, lazily.

    A gain only falls as rows come in, so a row whose stale gain leads is looked at again and, if it
    still leads, is the best. Rows that are then refused still count: what follows may not depend on
    the rows before it being kept.
    """
    share = COVERAGE * weights / max(float(weights.sum()), 1e-9)
    held = np.zeros(len(weights), dtype=np.float64)
    step = share.astype(np.float64)
    heap: list[tuple[float, int, int]] = []
    entered = done = 0
    while done < len(relevance):
        while entered < min(len(relevance), FIRST_WINDOW + WINDOW_GROWTH * done):
            gain = float(relevance[entered]) + float(on[entered] @ step)
            heapq.heappush(heap, (-gain, entered, done))
            entered += 1
        _, i, stamp = heapq.heappop(heap)
        if stamp < done:
            gain = float(relevance[i]) + float(on[i] @ step)
            heapq.heappush(heap, (-gain, i, done))
            continue
        yield i
        held += on[i]
        step = share * (np.sqrt(held + 1) - np.sqrt(held))
        done += 1


def _round_robin(
    relevance: Float32[np.ndarray, " n"],
    on: Float32[np.ndarray, "n groups"],
    weights: Float32[np.ndarray, " groups"],
) -> Order:
    """Let concepts take turns, the heaviest first; each gives its best row within the window."""
    queues = [
        np.flatnonzero(on[:, group]).tolist()[::-1] for group in np.argsort(-weights, kind="stable")
    ]
    queues.append(list(range(len(relevance)))[::-1])
    taken: set[int] = set()
    while len(taken) < len(relevance):
        for queue in queues:
            while queue and queue[-1] in taken:
                queue.pop()
            if queue and queue[-1] < FIRST_WINDOW + WINDOW_GROWTH * len(taken):
                taken.add(queue[-1])
                yield queue.pop()


_ORDERS: dict[
    SelectorName,
    Callable[
        [
            Float32[np.ndarray, " n"],
            Float32[np.ndarray, "n groups"],
            Float32[np.ndarray, " groups"],
        ],
        Order,
    ],
] = {"greedy": _greedy, "topk": _topk, "round_robin": _round_robin}
