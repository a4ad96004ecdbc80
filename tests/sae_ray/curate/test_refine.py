"""The refine loop shows the top, then rows unlike each other, and looks elsewhere when lost."""

import numpy as np
import pytest

from sae_ray.curate.evidence import ProfileSettings
from sae_ray.curate.profile import Profile, build_profile
from sae_ray.curate.refine import NUM_TOP, rows_to_show
from sae_ray.curate.score import Scores, score_pool
from sae_ray.curate.space import HiddenSpace
from tests.sae_ray.curate.planted import NUM_ROWS, Planted

WORDS_ALONE = ProfileSettings(description_weight=0.0)
TASK = "Bake bread: dough, flour and an oven"
NUM_CANDIDATES = 60


def ask(
    planted: Planted, task: str, keep: list[str], drop: list[str], num: int = NUM_CANDIDATES
) -> tuple[Profile, Scores]:
    profile = build_profile(task, planted.index, keep=keep, drop=drop, settings=WORDS_ALONE)
    return profile, score_pool(planted.index, profile, num_candidates=num)


def ids(planted: Planted, rows: np.ndarray | list[int]) -> list[str]:
    return [planted.index.ids[row] for row in rows]


@pytest.fixture
def asked(planted: Planted) -> tuple[Profile, Scores]:
    return ask(planted, TASK, [], [])


def test_the_top_comes_first_and_no_row_twice(
    planted: Planted, asked: tuple[Profile, Scores]
) -> None:
    shown = rows_to_show(planted.index, *asked)
    assert len(set(shown.tolist())) == 20
    assert shown[:NUM_TOP].tolist() == asked[1].order(NUM_TOP).tolist()
    assert rows_to_show(planted.index, *asked, num=3).tolist() == shown[:3].tolist()


def test_the_other_rows_are_less_alike_than_the_best_are(
    planted: Planted, asked: tuple[Profile, Scores]
) -> None:
    space = HiddenSpace.fit(planted.index.background)

    def likeness(rows: np.ndarray) -> float:
        x = space.project(planted.index.take(rows))
        return float((x @ x.T)[~np.eye(len(x), dtype=bool)].mean())

    shown = rows_to_show(planted.index, *asked)
    assert likeness(shown[NUM_TOP:]) < likeness(asked[1].order(20)[NUM_TOP:]) - 0.1


def test_rows_that_were_judged_or_seen_are_not_shown_again(
    planted: Planted, asked: tuple[Profile, Scores]
) -> None:
    first = rows_to_show(planted.index, *asked)
    keep, drop, seen = first[:5], first[5:10], first[10:]
    profile, scores = ask(planted, TASK, ids(planted, keep), ids(planted, drop))
    again = rows_to_show(planted.index, profile, scores, seen=seen.tolist())
    assert len(again) == 20
    assert not set(first.tolist()) & set(again.tolist())


def test_when_nothing_right_was_found_it_looks_elsewhere(planted: Planted) -> None:
    # No kept row, some dropped: a part of what is shown stands for the rest of the pool.
    lost = "Sail a boat"
    wrong = ids(planted, np.flatnonzero(planted.relevant("sailing"))[:5])
    profile, scores = ask(planted, lost, [], wrong)
    known = {*scores.candidates.rows.tolist(), *np.argsort(-scores.lexical)[:100].tolist()}
    shown = rows_to_show(planted.index, profile, scores)
    outside = [row for row in shown.tolist() if row not in known]
    assert len(shown) == 20
    assert 4 <= len(outside) <= 8
    # A kept row ends the search elsewhere.
    keep = ids(planted, np.flatnonzero(planted.relevant("chess"))[:1])
    profile, scores = ask(planted, lost, keep, wrong)
    known = {*scores.candidates.rows.tolist(), *np.argsort(-scores.lexical)[:100].tolist()}
    assert set(rows_to_show(planted.index, profile, scores).tolist()) <= known


def test_a_pool_that_is_seen_whole_has_nothing_to_show(
    planted: Planted, asked: tuple[Profile, Scores]
) -> None:
    shown = rows_to_show(planted.index, *asked, seen=range(NUM_ROWS))
    assert shown.tolist() == []


def test_ticks_lead_from_words_that_mislead_to_the_task(planted: Planted) -> None:
    # The words are those of another task: the person wants chess.
    relevant = planted.relevant("chess")
    keep: list[str] = []
    drop: list[str] = []
    seen: list[int] = []
    recalls = []
    for _ in range(4):
        profile, scores = ask(planted, "Sail a boat", keep, drop, num=400)
        recalls.append(planted.recall("chess", scores.total))
        shown = rows_to_show(planted.index, profile, scores, seen=seen).tolist()
        seen += shown
        keep += ids(planted, [row for row in shown if relevant[row]][:5])
        drop += ids(planted, [row for row in shown if not relevant[row]][:5])
    assert recalls[0] < 0.2
    assert recalls[-1] > 0.8
