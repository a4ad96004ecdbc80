"""The evaluation of curation: figures that can be counted by hand, and every arm at work."""

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from sae_ray.curate.baselines import DenseText, HashedNgrams
from sae_ray.curate.profile import build_profile
from sae_ray.curate.settings import IndexSettings
from sae_ray.distributed.data import build_index
from sae_ray.evaluate.curation import (
    Cell,
    Description,
    ResidentIndex,
    abstentions,
    precision_at,
    read_descriptions,
    run_quality,
    shuffle,
    summarise,
)

SENTENCES = Path(__file__).parents[2] / "benchmarks" / "curation_descriptions.yaml"


def test_an_empty_place_is_a_miss_and_few_positives_are_no_handicap() -> None:
    relevant = np.array([True, False, True, False, False, True])
    assert precision_at(np.array([0, 1, 2, 3]), relevant, 4) == pytest.approx(2 / 3)
    assert precision_at(np.array([0, 2, 5, 1]), relevant, 4) == 1
    assert precision_at(np.array([0]), relevant, 2) == 0.5
    assert precision_at(np.array([], dtype=np.int64), relevant, 2) == 0


def cell(arm: str, domain: str, number: int, precision: float, *, abstained: bool = False) -> Cell:
    return Cell(arm, domain, "report", number, precision, abstained)


CELLS = [
    *(cell("bm25", "a", i, p) for i, p in enumerate((0.2, 0.4))),
    *(cell("bm25", "b", i, p) for i, p in enumerate((0.5, 0.5))),
    *(cell("ours", "a", i, p) for i, p in enumerate((0.1, 0.9))),
    *(cell("ours", "b", i, p) for i, p in enumerate((0.5, 1.0))),
]


def test_a_summary_counts_cells_and_draws_domains() -> None:
    ours, bm25 = summarise(CELLS)
    assert (ours.arm, bm25.arm) == ("ours", "bm25")
    assert ours.precision == pytest.approx(2.5 / 4)
    assert ours.difference == pytest.approx(0.9 / 4)
    assert (ours.wins, ours.losses, ours.num_cells) == (2, 1, 4)
    # Two domains: the interval reaches from one's mean to the other's, and no single cell.
    assert (ours.low, ours.high) == (pytest.approx(0.5), pytest.approx(0.75))
    assert (ours.difference_low, ours.difference_high) == (pytest.approx(0.2), pytest.approx(0.25))
    assert (bm25.difference, bm25.wins, bm25.losses) == (0, 0, 0)


def test_the_interval_is_that_of_means_over_domains_drawn_again() -> None:
    means = {"a": 0.0, "b": 0.3, "c": 0.9, "d": 0.6, "e": 0.2}
    cells = [
        cell(arm, domain, i, p)
        for arm in ("bm25", "ours")
        for domain, p in means.items()
        for i in (0, 1)
    ]
    ours = next(s for s in summarise(cells) if s.arm == "ours")
    every = np.array(list(itertools.product(means.values(), repeat=5))).mean(1)
    low, high = np.quantile(every, [0.025, 0.975], method="inverted_cdf")
    assert (ours.low, ours.high) == (pytest.approx(low, abs=0.03), pytest.approx(high, abs=0.03))
    assert (low, high) == (pytest.approx(0.14), pytest.approx(0.7))


def test_one_domain_alone_has_no_spread() -> None:
    one = [c for c in CELLS if c.domain == "a"]
    ours = next(s for s in summarise(one) if s.arm == "ours")
    assert ours.low == ours.high == ours.precision == pytest.approx(0.5)


def test_splits_are_kept_apart() -> None:
    tune = [dataclasses.replace(c, split="tune", precision=1.0) for c in CELLS]
    found = {(s.split, s.arm): s.precision for s in summarise([*CELLS, *tune])}
    assert found["tune", "bm25"] == 1
    assert found["report", "bm25"] == pytest.approx(0.4)


def test_abstentions_are_counted_right_and_wrong() -> None:
    cells = [
        cell("default", "a", 0, 0.5),
        cell("default", "a", 1, 0.49, abstained=True),
        cell("default", "b", 0, 0.1),
        cell("default", "b", 1, 0.9, abstained=True),
        cell("bm25", "b", 1, 0.9),
    ]
    assert abstentions(cells) == {
        "report": {
            "right, abstained": 1,
            "right, sure": 1,
            "wrong, abstained": 1,
            "wrong, sure": 1,
        }
    }


def test_the_sentences_are_ten_domains_with_two_for_each_use() -> None:
    found = read_descriptions(SENTENCES.read_text())
    assert len(found) == 60
    assert len({(one.domain, one.split) for one in found}) == 30
    assert len({one.text for one in found}) == 60
    assert (
        len({one.domain for one in read_descriptions(SENTENCES.read_text(), "small_domains")}) == 6
    )


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory, make_pool: Callable[[Path, int], Path]) -> Path:
    return make_pool(tmp_path_factory.mktemp("pool") / "pool.jsonl", 300)


@pytest.fixture(scope="module")
def index(
    tmp_path_factory: pytest.TempPathFactory,
    pool: Path,
    tiny_lm_of: Callable[[str], Path],
    make_tiny_sae: Callable[[Path], Path],
) -> ResidentIndex:
    folder = tmp_path_factory.mktemp("index")
    settings = IndexSettings(
        pool=str(pool),
        lm=str(tiny_lm_of("llama")),
        sae=str(make_tiny_sae(folder / "sae")),
        dtype="float32",
        rows_per_shard=128,
        check_fit=False,
        num_workers=0,
    )
    list(build_index(settings, str(folder / "index")))
    return ResidentIndex(str(folder / "index"))


@pytest.fixture(scope="module")
def truth(pool: Path) -> list[str]:
    return [json.loads(line)["source"] for line in pool.read_text().splitlines()]


def test_a_resident_index_reads_what_a_stream_reads(index: ResidentIndex) -> None:
    for means_only in (True, False):
        resident = list(index.blocks(means_only=means_only))
        assert (resident[0].maxes is None) == means_only
        assert [len(block) for block in resident] == [128, 128, 44]
    assert list(index.blocks(means_only=True))[0] is list(index.blocks(means_only=True))[0]


def test_every_arm_answers_every_sentence(index: ResidentIndex, truth: list[str]) -> None:
    asked = [
        Description("rivers", "report", 0, "A bridge over the river, a boat on the water, rain"),
        Description("music", "report", 0, "Sing a song with a piano and a voice"),
    ]
    texts = [one.text() for one in index.conversations(range(index.num_rows))]
    states = np.eye(3, dtype=np.float32)[[("orders", "rivers", "music").index(t) for t in truth]]
    queries = {one.text: states[truth.index(one.domain)][None] for one in asked}
    cells = list(
        run_quality(
            index,
            index,
            truth,
            asked,
            texts=DenseText(texts, dimensions=10),
            ngrams=HashedNgrams(texts),
            final_states=(states, queries),
            budget=50,
        )
    )
    found = {(one.arm, one.domain): one.precision for one in cells}
    arms = {one.arm for one in cells}
    assert {arm for arm, domain in found if domain == "music"} == arms
    assert {arm for arm, domain in found if domain == "rivers"} == arms - {"another_tasks_profile"}
    for domain in ("rivers", "music"):
        for arm in ("default", "bm25", "bm25_rm3", "lsa", "dsir", "rds_plus", "refine_3"):
            assert found[arm, domain] == 1, arm
        assert found["examples_20", domain] >= 0.9
        # A third of the pool is right: what looks at nothing finds about that.
        for arm in ("random", "random_length_matched", "shuffled_profile"):
            assert found[arm, domain] < 0.7, arm
    assert found["another_tasks_profile", "music"] == 0


def test_shuffled_weights_are_those_of_the_profile(index: ResidentIndex) -> None:
    profile = build_profile("Sing a song with a piano and a voice", index)
    shuffled = shuffle(profile, index.d_sae, 0)
    assert [one.weight for one in shuffled.latents] == [one.weight for one in profile.latents]
    assert len({one.latent for one in shuffled.latents}) == len(profile.latents)
    assert_array_equal(shuffled.direction, profile.direction)
    moved = [a.latent != b.latent for a, b in zip(profile.latents, shuffled.latents, strict=True)]
    assert np.mean(moved) > 0.8
    assert shuffle(profile, index.d_sae, 1) != shuffled
