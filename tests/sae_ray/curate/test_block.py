"""Pooled rows keep their laws in memory, and their digits on disk."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_ray.curate.block import MEANS_ONLY, SEGMENTS, IndexBlock

D_SAE, D_IN = 30, 5


def tokens(seed: int, num_rows: int = 8) -> list[tuple[np.ndarray, np.ndarray]]:
    """Latents [tokens, d_sae] of each row's prompt and response, sparse, some segments empty."""
    rng = np.random.default_rng(seed)
    rows = []
    for row in range(num_rows):
        lengths = rng.integers(0, 9, 2) if row else (0, 3)
        lengths = lengths if sum(lengths) else (1, 0)
        rows.append(
            tuple(
                rng.gamma(2, 1, (n, D_SAE)).astype(np.float32) * (rng.random((n, D_SAE)) < 0.2)
                for n in lengths
            )
        )
    return rows


def make(seed: int = 0, num_rows: int = 8, scale: float = 1.0) -> IndexBlock:
    """Pool rows one by one."""
    rng = np.random.default_rng(seed)
    rows = [tuple(s * np.float32(scale) for s in row) for row in tokens(seed, num_rows)]
    kept = [np.flatnonzero(np.concatenate(row).any(0)) for row in rows]

    def entries(reduce, dtype) -> np.ndarray:
        empty = np.zeros((0, 2), dtype=dtype)
        parts = [
            np.stack([reduce(s)[latents] if len(s) else 0 * latents for s in row], axis=1)
            for row, latents in zip(rows, kept, strict=True)
        ]
        return np.concatenate([empty, *parts]).astype(dtype)

    return IndexBlock(
        rows=np.arange(num_rows) + 100 * seed,
        ids=[f"{seed}-{i}" for i in range(num_rows)],
        n_tokens=np.array([[len(s) for s in row] for row in rows], dtype=np.int32).reshape(-1, 2),
        truncated=rng.random(num_rows) < 0.5,
        hidden=(rng.normal(size=(num_rows, 2, D_IN)) * scale).astype(np.float32),
        l1=np.array(
            [[s.sum() / max(len(s), 1) for s in row] for row in rows], dtype=np.float32
        ).reshape(-1, 2),
        indptr=np.cumsum([0, *map(len, kept)]).astype(np.int64),
        latents=np.concatenate([np.zeros(0), *kept]).astype(np.int32),
        means=entries(lambda s: s.mean(0), np.float32),
        maxes=entries(lambda s: s.max(0), np.float32),
        counts=entries(lambda s: (s > 0).sum(0), np.int32),
        d_sae=D_SAE,
    )


REDUCE = {
    "mean": lambda x: x.mean(0),
    "sum": lambda x: x.sum(0),
    "max": lambda x: x.max(0),
    "count": lambda x: (x > 0).sum(0),
    "binary": lambda x: (x > 0).any(0),
}


@pytest.mark.parametrize("segment", ["all", *SEGMENTS])
@pytest.mark.parametrize("how", REDUCE)
def test_every_pooling_of_every_segment_is_that_of_its_tokens(how, segment):
    which = slice(None) if segment == "all" else slice(*((0, 1) if segment == "prompt" else (1, 2)))
    runs = [np.concatenate(row[which]) for row in tokens(0)]
    expected = [REDUCE[how](x) if len(x) else np.zeros(D_SAE) for x in runs]
    pooled = make().pooled(how, segment)
    assert pooled.dtype == np.float32
    np.testing.assert_allclose(pooled.toarray(), np.stack(expected), rtol=1e-5)


def test_the_hidden_mean_of_a_conversation_weighs_its_segments_by_their_tokens():
    block = make()
    for row in range(len(block)):
        expected = np.average(block.hidden[row], axis=0, weights=block.n_tokens[row])
        np.testing.assert_allclose(block.hidden_mean()[row], expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(block.hidden_mean("response")[row], block.hidden[row, 1])


def assert_same(a: IndexBlock, b: IndexBlock, rtol: float = 0) -> None:
    assert (a.ids, a.d_sae, len(a)) == (b.ids, b.d_sae, len(b))
    for name in ("rows", "n_tokens", "truncated", "indptr", "latents", "counts", "l1"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
        assert getattr(a, name).dtype == getattr(b, name).dtype, name
    for name in ("hidden", "means", "maxes"):
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=rtol, err_msg=name)
        assert getattr(a, name).dtype == np.float32


@given(
    which=st.lists(st.integers(0, 7), max_size=12), again=st.lists(st.integers(0, 11), max_size=5)
)
@settings(max_examples=40, deadline=None)
def test_taking_twice_is_taking_once(which, again):
    block = make()
    taken = block.take(which)
    np.testing.assert_array_equal(
        taken.pooled("max").toarray(), block.pooled("max").toarray()[which]
    )
    again = [i for i in again if i < len(which)]
    assert_same(taken.take(again), block.take([which[i] for i in again]))


def test_what_is_cut_and_laid_end_to_end_is_the_same():
    block = make()
    for cuts in ([0, 8], [0, 3, 8], [0, 0, 5, 5, 8]):
        parts = [block.take(range(a, b)) for a, b in zip(cuts, cuts[1:], strict=False)]
        assert_same(IndexBlock.concatenate(parts), block)
    both = IndexBlock.concatenate([make(1), make(2)])
    assert_same(both.take(range(8)), make(1))
    assert_same(both.take(range(8, 16)), make(2))


@pytest.mark.parametrize("scale", [1e-9, 1e-4, 1.0, 1e7])
def test_a_table_keeps_its_digits_whatever_the_size_of_the_values(scale):
    block = make(scale=scale)
    read = IndexBlock.from_table(block.to_table(), D_SAE)
    np.testing.assert_allclose(read.means, block.means, rtol=2.5e-3)
    np.testing.assert_allclose(read.hidden, block.hidden, rtol=5e-4, atol=1e-6 * scale)
    on = block._means_when_on()
    assert read.maxes is not None
    assert block.maxes is not None
    error = np.abs(read.maxes - block.maxes)
    assert (error <= 2.5e-3 * on + 1e-2 * (block.maxes - on) + 1e-6 * block.maxes).all()
    assert_same(read, block, rtol=1.2e-2)


def test_a_latent_on_once_has_its_mean_for_a_maximum():
    block = make()
    assert block.counts is not None
    table = block.to_table()
    for s, segment in enumerate(SEGMENTS):
        peaks = np.concatenate(table[f"{segment}_peak"].to_pylist())
        assert not peaks[block.counts[:, s] <= 1].any()
        assert peaks[block.counts[:, s] > 1].any()


def test_peaks_keep_seven_binary_digits_and_no_more():
    table = make().to_table()
    raw = np.concatenate([table[f"{s}_peak"].to_numpy()[i] for s in SEGMENTS for i in range(8)])
    assert not (raw.view(np.uint16) & 0b111).any()
    assert len(np.unique(raw)) > 20


def test_rows_of_shards_with_scales_of_their_own_are_read_together():
    blocks = [make(1, scale=1e-6), make(2, scale=1e6)]
    table = pa.concat_tables([block.to_table() for block in blocks])
    assert_same(IndexBlock.from_table(table, D_SAE), IndexBlock.concatenate(blocks), rtol=1.2e-2)
    order = [12, 3, 15, 0]
    expected = IndexBlock.concatenate(blocks).take(order)
    assert_same(IndexBlock.from_table(table.take(order), D_SAE), expected, rtol=1.2e-2)
    assert_same(
        IndexBlock.from_table(table.slice(5, 6), D_SAE),
        IndexBlock.concatenate(blocks).take(range(5, 11)),
        rtol=1.2e-2,
    )


def test_means_can_be_read_without_maxima():
    block = make()
    read = IndexBlock.from_table(block.to_table().select(MEANS_ONLY), D_SAE)
    assert read.maxes is None
    assert read.counts is None
    np.testing.assert_allclose(read.pooled().toarray(), block.pooled().toarray(), rtol=2.5e-3)
    assert read.take([1, 2]).maxes is None
    assert IndexBlock.concatenate([read, block]).maxes is None
    with pytest.raises(AssertionError, match="means only"):
        read.pooled("max")
    with pytest.raises(AssertionError, match="means only"):
        read.to_table()


def test_a_block_of_no_rows_is_written_and_read():
    for empty in (make(num_rows=0), make().take([])):
        assert_same(IndexBlock.from_table(empty.to_table(), D_SAE), empty)


def test_counts_of_very_long_segments_are_not_wrapped():
    block = make()
    assert block.counts is not None
    block.counts[0, 1] = 2**16 + 5
    read = IndexBlock.from_table(block.to_table(), D_SAE)
    assert read.counts is not None
    np.testing.assert_array_equal(read.counts, block.counts)
