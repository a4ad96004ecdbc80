"""Refine loop: which rows to show a person, so that a few ticks say the most.

A few rows are the top. The rest are spread: each is a likely row unlike those already shown or
judged, so that when the top is wrong some other kind of row is there to keep. Where a profile has
abstained or a round found nothing right, rows for large parts of the pool are shown too.
"""

from collections.abc import Collection

import numpy as np
from jaxtyping import Float32, Int64

from sae_ray.curate.block import IndexBlock
from sae_ray.curate.index import FeatureIndex
from sae_ray.curate.profile import Profile
from sae_ray.curate.score import Scores
from sae_ray.curate.space import HiddenSpace

NUM_SHOWN = 20
NUM_TOP = 4
_NUM_LEXICAL = 100
_NUM_BEST = 400
_NUM_EXPLORED = 8
"""Of the rows shown, those for large parts of the pool, while nothing is known to be right."""


def rows_to_show(
    index: FeatureIndex,
    profile: Profile,
    scores: Scores,
    *,
    seen: Collection[int] = (),
    num: int = NUM_SHOWN,
) -> Int64[np.ndarray, " n"]:
    """Return row numbers to judge: the top first, then rows unlike each other.

    Args:
        index: the pool's index.
        profile: the task; rows it keeps or drops are not shown again.
        scores: of the pool against the profile.
        seen: rows that were shown before, whatever was said of them.
        num: how many.
    """
    judged = {seed.row for seed in profile.seeds if seed.channel in ("keep", "drop")}
    hidden_from = {*seen, *(row for row in judged if row is not None)}
    space = index.space
    pool = _candidates(index, profile, scores)
    before = space.project(pool.take([i for i, r in enumerate(pool.rows) if int(r) in hidden_from]))
    pool = pool.take([i for i, row in enumerate(pool.rows) if int(row) not in hidden_from])
    lost = profile.num_given == 0 and (profile.abstained or bool(hidden_from))
    explored = min(_NUM_EXPLORED, num // 2) if lost else 0
    likely = 0.5 * _ranks(scores.total[pool.rows]) + 0.5 * _ranks(scores.lexical[pool.rows])
    order = np.argsort(-scores.total[pool.rows], kind="stable")
    x = space.project(pool)
    chosen = _spread(x, likely, order[: min(NUM_TOP, num)].tolist(), num - explored, before)
    shown = pool.rows[chosen]
    if explored:
        others = _explore(
            index.background, space, x[chosen], before, {*hidden_from, *shown.tolist()}
        )
        shown = np.concatenate([shown, others[:explored]])
    return shown.astype(np.int64)


def _candidates(index: FeatureIndex, profile: Profile, scores: Scores) -> IndexBlock:
    """Return the best rows by score, the best by words, and those judged."""
    best = scores.candidates.take(range(min(_NUM_BEST, len(scores.candidates))))
    lexical = scores.lexical
    words = np.argsort(-lexical, kind="stable")[:_NUM_LEXICAL]
    judged = [s.row for s in profile.seeds if s.row is not None and s.channel in ("keep", "drop")]
    wanted = dict.fromkeys([*words[lexical[words] > 0].tolist(), *judged])
    extra = [row for row in wanted if row not in set(best.rows.tolist())]
    return IndexBlock.concatenate([best, index.take_hidden(extra)]) if extra else best


def _ranks(values: Float32[np.ndarray, " n"]) -> Float32[np.ndarray, " n"]:
    ranks = np.zeros(len(values), dtype=np.float32)
    ranks[np.argsort(values, kind="stable")] = np.linspace(0, 1, len(values), dtype=np.float32)
    return ranks


def _spread(
    x: Float32[np.ndarray, "n r"],
    likely: Float32[np.ndarray, " n"],
    first: list[int],
    num: int,
    before: Float32[np.ndarray, "m r"],
) -> list[int]:
    """Add rows that maximise likely / 2 - (cosine with the nearest row shown)."""
    chosen = first[: min(num, len(x))]
    shown = np.concatenate([before, x[chosen]])
    near = (x @ shown.T).max(1) if len(shown) else np.full(len(x), -1.0)
    near[chosen] = np.inf
    while len(chosen) < min(num, len(x)):
        i = int(np.argmax(0.5 * likely - np.maximum(near, 0)))
        chosen.append(i)
        near = np.maximum(near, x @ x[i])
        near[chosen] = np.inf
    return chosen


def _explore(
    background: IndexBlock,
    space: HiddenSpace,
    shown: Float32[np.ndarray, "m r"],
    before: Float32[np.ndarray, "k r"],
    hidden_from: set[int],
) -> Int64[np.ndarray, " n"]:
    """Return background rows that greedily cover the most of what the rows shown do not.

    Facility location: each step takes the row that adds the most to Σ_b max_s max(0, cos(b, s)).
    """
    x = space.project(background)
    similar = np.maximum(x @ x.T, 0) ** 2
    covered = (np.maximum(x @ np.concatenate([shown, before]).T, 0) ** 2).max(1)
    free = np.array([int(row) not in hidden_from for row in background.rows])
    chosen: list[int] = []
    while len(chosen) < _NUM_EXPLORED and free.any():
        gain = np.maximum(similar - covered[:, None], 0).sum(0)
        i = int(np.argmax(np.where(free, gain, -1)))
        chosen.append(i)
        free[i] = False
        covered = np.maximum(covered, similar[:, i])
    return background.rows[chosen].astype(np.int64)
