"""Repeats: the paper's any-hit rule in order, and the same by content whatever the order."""

import random

import numpy as np
import pytest

from sae_ray.sae.repeats import GRAM_WORDS, Grams


def words(rng: random.Random, num: int) -> str:
    return " ".join(rng.choices([f"w{i}" for i in range(500)], k=num))


@pytest.fixture
def pool() -> list[list[str]]:
    """Rows of which some share 20 words on end: a chain 0-1-2, a copy, and a near miss."""
    rng = random.Random(0)
    a, b, c = (words(rng, 20) for _ in range(3))
    first = a.split()
    return [
        [f"{words(rng, 7)} {a}"],
        [f"{a} {words(rng, 9)} {b}"],
        [words(rng, 5), f"{b} {words(rng, 3)}"],
        ["thank you"],
        ["thank you"],
        [f"{c} tail"],
        [words(rng, 30), f"{c} tail"],
        [" ".join([*first[:19], "else"])],
        [f"{' '.join(first[:10])}", f"{' '.join(first[10:])}"],
        [f"{a.upper().replace(' ', ', ')}"],
    ]


def brute_force(pool: list[list[str]], order: list[int], n: int = GRAM_WORDS) -> list[int]:
    """The paper's algorithm, word by word."""
    seen: set[tuple[str, ...]] = set()
    dropped = []
    for row in order:
        mine = set()
        for turn in pool[row]:
            split = turn.lower().replace(",", "").split()
            mine |= {tuple(split[i : i + n]) for i in range(len(split) - n + 1)}
        if mine & seen:
            dropped.append(row)
        else:
            seen |= mine
    return sorted(dropped)


def test_in_order_it_is_the_papers_rule(pool) -> None:
    found = Grams.of(enumerate(pool)).repeats("rows")
    assert found == brute_force(pool, list(range(len(pool))))
    # 2 shares words with 1 alone, which is dropped: it stays. So do short turns and near misses.
    assert found == [1, 6, 9]


def test_many_random_rows_agree_with_brute_force() -> None:
    rng = random.Random(1)
    pieces = [words(rng, 6) for _ in range(30)]
    pool = [[" ".join(rng.choices(pieces, k=rng.randint(1, 5)))] for _ in range(300)]
    grams = Grams.of(enumerate(pool), num_words=8)
    expected = brute_force(pool, list(range(300)), 8)
    assert grams.repeats("rows") == expected
    assert 50 < len(expected) < 250


def test_by_content_the_order_of_the_pool_decides_nothing(pool) -> None:
    rng = random.Random(2)
    pieces = [words(rng, 20) for _ in range(20)]
    pool += [[" ".join(rng.choices(pieces, k=2))] for _ in range(60)]
    kept, in_order = set(), set()
    for seed in range(5):
        mixed = random.Random(seed).sample(pool, len(pool))
        grams = Grams.of(enumerate(mixed))
        for gone, results in (
            (grams.repeats("content"), kept),
            (grams.repeats("rows"), in_order),
        ):
            left = sorted("|".join(x) for i, x in enumerate(mixed) if i not in gone)
            results.add(tuple(left))
    assert len(kept) == 1
    assert len(in_order) > 1


def test_a_pool_in_parts_gives_what_the_whole_does(pool) -> None:
    whole = Grams.of(enumerate(pool))
    rows = list(enumerate(pool))
    parts = [Grams.of(rows[:4]), Grams.of(rows[4:]), Grams.of([])]
    assert Grams.joined(parts).repeats("rows") == whole.repeats("rows")
    shared = whole.shared()
    assert shared.repeats("rows") == whole.repeats("rows")
    assert 0 < len(np.unique(shared.rows)) < len(pool)
    assert Grams.of([]).repeats("content") == []
