import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from sae_ray.artifacts import verify
from sae_ray.curate.index import FeatureIndex
from sae_ray.curate.settings import IndexSettings
from sae_ray.distributed.data import build_index
from sae_ray.errors import ArtifactError, PoolError


@pytest.fixture
def index(tiny_settings: IndexSettings, tmp_path: Path) -> FeatureIndex:
    list(build_index(tiny_settings, str(tmp_path / "index")))
    return FeatureIndex(str(tmp_path / "index"))


def with_lines(settings: IndexSettings, extra: list[str]) -> IndexSettings:
    pool = Path(settings.pool_source)
    pool.write_text(pool.read_text() + "\n".join(extra) + "\n")
    return settings


def test_every_row_of_the_pool_is_in_the_index_in_order(index: FeatureIndex) -> None:
    assert index.ids == [f"row-{i}" for i in range(60)]
    assert [block.rows[0] for block in index.blocks()] == [0, 16, 32, 48]
    assert index.n_tokens.min() > 0
    verify(index.path)


def test_take_returns_the_rows_that_streaming_returns(index: FeatureIndex) -> None:
    rows = np.array([59, 0, 17, 16, 3])
    taken = index.take(rows)
    whole = [block.pooled("max").toarray() for block in index.blocks()]
    np.testing.assert_array_equal(taken.pooled("max").toarray(), np.concatenate(whole)[rows])
    assert taken.ids == [index.ids[row] for row in rows]
    assert [c.id for c in index.conversations(rows)] == taken.ids


def test_a_stored_row_equals_scoring_its_conversation_alone(index: FeatureIndex) -> None:
    for row in (0, 31, 59):
        alone = index.scorer(index.conversations([row]), [0]).block
        stored = index.take([row])
        # Floats are halved on disk.
        for how in ("mean", "max", "count"):
            np.testing.assert_allclose(
                stored.pooled(how).toarray(), alone.pooled(how).toarray(), rtol=6e-3, atol=1e-4
            )
        np.testing.assert_allclose(stored.hidden, alone.hidden, rtol=1e-3, atol=1e-3)


def test_statistics_are_those_of_the_rows(index: FeatureIndex) -> None:
    blocks = list(index.blocks())
    counts = np.concatenate([block.pooled("count").toarray() for block in blocks])
    means = np.concatenate([block.pooled("mean").toarray() for block in blocks])
    stats = index.stats
    np.testing.assert_allclose(stats.document_frequency, (counts > 0).mean(0), rtol=1e-6)
    # All 60 rows are in the background of so small a pool.
    assert len(index.background) == 60
    share_on = (means > stats.on_threshold).mean(0)
    assert (share_on <= 0.2).all()
    assert (share_on[stats.on_threshold > 0] > 0.1).all()


def test_latents_at_template_tokens_are_counted_apart(index: FeatureIndex) -> None:
    # A random SAE fires everywhere: about as much at template tokens as their share of tokens.
    share = index.stats.template_share
    assert 0 < share.mean() < 1
    assert (share <= 1).all()


def test_lexical_scores_find_the_rows_that_hold_the_words(index: FeatureIndex) -> None:
    scores = index.lexical_scores("piano chords")
    best = np.argsort(-scores)[:10]
    assert {index.column("source")[i] for i in best} == {"music"}
    assert (index.lexical_scores("zebra") == 0).all()
    assert (index.lexical_scores('"quoted" OR (NEAR')).shape == (60,)


def test_rows_that_cannot_be_read_are_listed_with_reasons(
    tiny_settings: IndexSettings, tmp_path: Path
) -> None:
    bad = [
        "{broken",
        json.dumps({"id": "empty", "messages": []}),
        json.dumps(
            {
                "id": "row-3",
                "messages": [
                    {"role": "user", "content": "again"},
                    {"role": "assistant", "content": "yes"},
                ],
            }
        ),
    ]
    path = str(tmp_path / "index")
    list(build_index(with_lines(tiny_settings, bad), path))
    index = FeatureIndex(path)
    rejected = pq.read_table(f"{path}/rejected.parquet").to_pylist()
    assert [row["row"] for row in rejected] == [60, 61, 62]
    assert rejected[2]["reason"] == "id of an earlier row"
    assert rejected[2]["excerpt"] == "row 3"
    assert index.num_rows == len(index.ids) == 60
    # The duplicate is left out wherever the index is read.
    assert sum(map(len, index.blocks())) == 60
    assert index.take([59]).ids == ["row-59"]
    assert len(index.lexical_scores("again")) == 60
    assert index.manifest.extra["num_rejected"] == 3


def test_a_duplicate_in_the_middle_does_not_shift_its_neighbours(
    tiny_settings: IndexSettings, tmp_path: Path
) -> None:
    pool = Path(tiny_settings.pool_source)
    lines = pool.read_text().splitlines()
    pool.write_text("\n".join([*lines[:20], lines[4], *lines[20:]]) + "\n")
    path = str(tmp_path / "index")
    list(build_index(tiny_settings, path))
    index = FeatureIndex(path)
    assert index.ids == [f"row-{i}" for i in range(60)]
    for row in (19, 20, 21, 31, 32):
        assert index.conversations([row])[0].id == f"row-{row}"
        assert index.take([row]).ids == [f"row-{row}"]


def test_a_pool_with_too_many_bad_rows_is_refused(
    tiny_settings: IndexSettings, tmp_path: Path
) -> None:
    with pytest.raises(PoolError, match=r"at least 20 of 100 rows.*at most 10%.*max_rej"):
        list(build_index(with_lines(tiny_settings, ["{"] * 40), str(tmp_path / "index")))


def test_a_bad_pool_is_refused_as_soon_as_that_is_certain(
    tiny_settings: IndexSettings, tmp_path: Path
) -> None:
    # 8 of 68 rows, all in the first of five shards: the other four are not scored for it.
    pool = Path(tiny_settings.pool_source)
    pool.write_text("{\n" * 8 + pool.read_text())
    path = tmp_path / "index"
    with pytest.raises(PoolError, match=r"at least 8 of 68 rows.*the first is row 0"):
        list(build_index(tiny_settings, str(path)))
    assert [file.name for file in (path / "shards").iterdir()] == ["00000.parquet"]
    # The run is continued by whoever allows more.
    allowed = tiny_settings.model_copy(update={"max_rejected": 0.2})
    assert len(list(build_index(allowed, str(path)))) == 5
    assert FeatureIndex(str(path)).num_rows == 60


def test_rows_that_are_in_the_pool_twice_do_not_make_it_a_bad_one(
    tiny_settings: IndexSettings, tmp_path: Path
) -> None:
    lines = Path(tiny_settings.pool_source).read_text().splitlines()
    path = str(tmp_path / "index")
    list(build_index(with_lines(tiny_settings, [*lines[:30], "{"]), path))
    extra = FeatureIndex(path).manifest.extra
    assert (extra["num_rows"], extra["num_rejected"]) == (60, 31)


@pytest.mark.parametrize(
    "name",
    ["shards/00001.parquet", "background.parquet", "stats.safetensors", "lexical.sqlite"],
)
@pytest.mark.parametrize("content", [None, b"junk"])
def test_a_lost_or_damaged_file_is_told_in_one_line(
    index: FeatureIndex, name: str, content: bytes | None
) -> None:
    file = Path(index.path) / name
    file.unlink()
    if content is not None:
        file.write_bytes(content)

    def read_all() -> None:
        opened = FeatureIndex(index.path)
        _ = opened.background, opened.ids, opened.lexical_scores("piano")

    with pytest.raises(ArtifactError, match=f"{index.path}.*make it again"):
        read_all()


def test_an_unfinished_index_is_not_opened(tiny_settings: IndexSettings, tmp_path: Path) -> None:
    path = str(tmp_path / "index")
    steps = build_index(tiny_settings, path)
    next(steps)
    del steps  # a generator that is let go is closed
    with pytest.raises(ArtifactError, match="not finished"):
        FeatureIndex(path)
