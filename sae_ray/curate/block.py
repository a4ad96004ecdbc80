"""IndexBlock: pooled latents of some conversations, in memory and as a Parquet table.

Kept for each conversation and segment (prompt, response) are the mean hidden state and, for every
latent active anywhere in it, mean, maximum and count over the segment's content tokens. Max, mean,
sum, count and binary pooling of a segment or of the whole conversation follow without the model.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float32, Int32, Int64
from scipy import sparse

SEGMENTS = ("prompt", "response")
Segment = Literal["all", "prompt", "response"]
Pooling = Literal["mean", "sum", "max", "count", "binary"]

MEAN_BITS = 8
"""Binary digits kept of a latent's mean (16-bit floats have 10): bf16 arithmetic leaves fewer that
mean something, and the rest is noise that does not compress, a tenth of the index."""
PEAK_BITS = 6
"""The same of how far a maximum stands above the mean when on."""
_HALF_MAX = 2.0**15


@dataclasses.dataclass(frozen=True)
class IndexBlock:
    """Some rows of an index, in pool order. Segment axes are (prompt, response)."""

    rows: Int64[np.ndarray, " n"]
    """Row numbers in the pool."""
    ids: list[str]
    n_tokens: Int32[np.ndarray, "n 2"]
    """Content tokens of each segment."""
    truncated: Bool[np.ndarray, " n"]
    """True where tokens past the limit were left out."""
    hidden: Float32[np.ndarray, "n 2 d_in"]
    """Mean hidden state at the hook point; zeros for an empty segment."""
    l1: Float32[np.ndarray, "n 2"]
    """Mean over tokens of the sum of all latents, those not kept included."""
    indptr: Int64[np.ndarray, " n_plus_1"]
    latents: Int32[np.ndarray, " nnz"]
    """Latents kept, ascending within a row."""
    means: Float32[np.ndarray, "nnz 2"]
    maxes: Float32[np.ndarray, "nnz 2"] | None
    counts: Int32[np.ndarray, "nnz 2"] | None
    """Maxima and counts are None where a reader asked for means only."""
    d_sae: int

    def __len__(self) -> int:
        return len(self.ids)

    def pooled(self, how: Pooling = "mean", segment: Segment = "all") -> sparse.csr_array:
        """Return pooled latents as a sparse float32 array [n, d_sae]."""
        values = self._values(how, segment)
        return sparse.csr_array(
            (values.astype(np.float32, copy=False), self.latents, self.indptr),
            shape=(len(self), self.d_sae),
        )

    def _values(self, how: Pooling, segment: Segment) -> np.ndarray:
        one = None if segment == "all" else SEGMENTS.index(segment)
        if how in ("mean", "sum"):
            return (
                self._means(one)
                if how == "mean"
                else self._means(one)
                * self._per_entry(self.n_tokens.sum(1) if one is None else self.n_tokens[:, one])
            )
        assert self.maxes is not None, "read with means only"
        assert self.counts is not None
        if how == "max":
            return self.maxes.max(1) if one is None else self.maxes[:, one]
        counts = self.counts.sum(1) if one is None else self.counts[:, one]
        return counts if how == "count" else counts > 0

    def _means(self, one: int | None) -> np.ndarray:
        if one is not None:
            return self.means[:, one]
        share = self._shares().astype(np.float32)
        return self.means[:, 0] * self._per_entry(share[:, 0]) + self.means[:, 1] * self._per_entry(
            share[:, 1]
        )

    def _shares(self) -> np.ndarray:
        """Share of each segment in a conversation's content tokens."""
        return self.n_tokens / np.maximum(self.n_tokens.sum(1, keepdims=True), 1)

    def _per_entry(self, per_row: np.ndarray) -> np.ndarray:
        return np.repeat(per_row.astype(np.float32, copy=False), np.diff(self.indptr))

    def hidden_mean(self, segment: Segment = "all") -> Float32[np.ndarray, "n d_in"]:
        """Return the mean hidden state over the content tokens of a segment, or of all."""
        if segment != "all":
            return self.hidden[:, SEGMENTS.index(segment)]
        share = self._shares().astype(np.float32)
        return np.einsum("ns,nsd->nd", share, self.hidden)

    def take(self, which: Sequence[int] | np.ndarray) -> "IndexBlock":
        """Return the rows at these positions, in the order given."""
        positions = np.asarray(which, dtype=np.int64)
        sizes = np.diff(self.indptr)[positions]
        starts = self.indptr[:-1][positions]
        indptr = np.concatenate([[0], np.cumsum(sizes)])
        entries = np.repeat(starts - indptr[:-1], sizes) + np.arange(indptr[-1])
        return dataclasses.replace(
            self,
            rows=self.rows[positions],
            ids=[self.ids[i] for i in positions],
            n_tokens=self.n_tokens[positions],
            truncated=self.truncated[positions],
            hidden=self.hidden[positions],
            l1=self.l1[positions],
            indptr=indptr,
            latents=self.latents[entries],
            means=self.means[entries],
            maxes=None if self.maxes is None else self.maxes[entries],
            counts=None if self.counts is None else self.counts[entries],
        )

    @staticmethod
    def concatenate(blocks: Sequence["IndexBlock"]) -> "IndexBlock":
        """Lay blocks end to end."""
        offsets = np.cumsum([0, *(block.indptr[-1] for block in blocks)])
        joined = {
            field: np.concatenate([getattr(block, field) for block in blocks])
            for field in ("rows", "n_tokens", "truncated", "hidden", "l1", "latents", "means")
        }
        whole = all(block.maxes is not None and block.counts is not None for block in blocks)
        return IndexBlock(
            ids=[one for block in blocks for one in block.ids],
            indptr=np.concatenate(
                [[0], *(b.indptr[1:] + at for b, at in zip(blocks, offsets, strict=False))]
            ).astype(np.int64),
            maxes=np.concatenate([b.maxes for b in blocks if b.maxes is not None])
            if whole
            else None,
            counts=np.concatenate([b.counts for b in blocks if b.counts is not None])
            if whole
            else None,
            d_sae=blocks[0].d_sae,
            **joined,
        )

    def to_table(self) -> pa.Table:
        """Return the block as a table of 16-bit floats, each column kind in a scale of its own.

        Hidden states are exact to 5e-4 of each value, means to 2.5e-3; maxima to 2.5e-3, and 1e-2
        of how far they stand above the mean when on.
        """
        assert self.maxes is not None, "read with means only"
        assert self.counts is not None
        peaks = self._peaks()
        scales = {"hidden": _scale(self.hidden), "latent": _scale(self.means, peaks)}
        index_type = pa.uint16() if self.d_sae <= 2**16 else pa.uint32()
        count_type = np.uint16 if self.counts.max(initial=0) < 2**16 else np.uint32
        offsets = pa.array(self.indptr.astype(np.int32))
        columns: dict[str, pa.Array] = {
            "row": pa.array(self.rows),
            "id": pa.array(self.ids, pa.string()),
            "truncated": pa.array(self.truncated),
        }
        for name, scale in scales.items():
            columns[f"{name}_scale"] = pa.array(np.full(len(self), scale, dtype=np.float32))
        for s, segment in enumerate(SEGMENTS):
            hidden = (self.hidden[:, s] * scales["hidden"]).astype(np.float16)
            columns[f"{segment}_tokens"] = pa.array(self.n_tokens[:, s])
            columns[f"{segment}_l1"] = pa.array(self.l1[:, s])
            columns[f"{segment}_hidden"] = pa.FixedSizeListArray.from_arrays(
                pa.array(hidden.ravel()), self.hidden.shape[2]
            )
        columns["latents"] = pa.ListArray.from_arrays(
            offsets, pa.array(self.latents).cast(index_type)
        )
        for s, segment in enumerate(SEGMENTS):
            for name, values in (
                ("mean", _rounded(self.means[:, s] * scales["latent"], MEAN_BITS)),
                ("peak", _rounded(peaks[:, s] * scales["latent"], PEAK_BITS)),
                ("count", self.counts[:, s].astype(count_type)),
            ):
                columns[f"{segment}_{name}"] = pa.ListArray.from_arrays(offsets, pa.array(values))
        return pa.table(columns)

    @classmethod
    def from_table(
        cls, table: pa.Table, d_sae: int, only: Bool[np.ndarray, " d_sae"] | None = None
    ) -> "IndexBlock":
        """Read a table back; without the columns of maxima and counts these are None.

        With `only` the entries of those latents alone are kept, in a fraction of the time; without
        the columns of latents there are none.
        """
        table = table.combine_chunks()
        if "latents" not in table.column_names:
            return cls._without_latents(table, d_sae)
        whole = "prompt_peak" in table.column_names
        offsets = table["latents"].combine_chunks().offsets.to_numpy().astype(np.int64)
        indptr = offsets - offsets[0]
        latents = _flat(table["latents"])
        chosen = slice(None)
        if only is not None:
            chosen = np.flatnonzero(only[latents])
            indptr = np.searchsorted(chosen, indptr).astype(np.int64)
        scale = table["latent_scale"].to_numpy()

        def entries(name: str, dtype: type) -> np.ndarray:
            # Filled column by column: half a gigabyte that is not held twice.
            values = np.empty((indptr[-1], len(SEGMENTS)), dtype=dtype)
            for s, segment in enumerate(SEGMENTS):
                values[:, s] = _flat(table[f"{segment}_{name}"])[chosen]
            return values if dtype is np.int32 else _unscaled(values, scale, indptr)

        block = dataclasses.replace(
            cls._without_latents(table, d_sae),
            indptr=indptr,
            latents=latents[chosen].astype(np.int32),
            means=entries("mean", np.float32),
            counts=entries("count", np.int32) if whole else None,
        )
        if not whole:
            return block
        peaks = entries("peak", np.float32)
        return dataclasses.replace(block, maxes=peaks + block._means_when_on())

    @classmethod
    def _without_latents(cls, table: pa.Table, d_sae: int) -> "IndexBlock":
        hidden = np.stack([_flat(table[f"{s}_hidden"]) for s in SEGMENTS])
        d_in = table["prompt_hidden"].type.list_size
        hidden = hidden.reshape(len(SEGMENTS), table.num_rows, d_in).transpose(1, 0, 2)
        return cls(
            rows=table["row"].to_numpy(),
            ids=table["id"].to_pylist(),
            n_tokens=np.stack([table[f"{s}_tokens"].to_numpy() for s in SEGMENTS], axis=1),
            truncated=table["truncated"].to_numpy(zero_copy_only=False),
            hidden=hidden.astype(np.float32) / table["hidden_scale"].to_numpy()[:, None, None],
            l1=np.stack([table[f"{s}_l1"].to_numpy() for s in SEGMENTS], axis=1),
            indptr=np.zeros(table.num_rows + 1, dtype=np.int64),
            latents=np.zeros(0, dtype=np.int32),
            means=np.zeros((0, len(SEGMENTS)), dtype=np.float32),
            maxes=None,
            counts=None,
            d_sae=d_sae,
        )

    def _means_when_on(self) -> Float32[np.ndarray, "nnz 2"]:
        """Mean over the tokens at which a latent is on."""
        assert self.counts is not None
        sums = self.means * np.repeat(
            self.n_tokens.astype(np.float32), np.diff(self.indptr), axis=0
        )
        return sums / np.maximum(self.counts, 1).astype(np.float32)

    def _peaks(self) -> Float32[np.ndarray, "nnz 2"]:
        """How far a maximum stands above the mean when on: 0 for the many on at one token only."""
        assert self.maxes is not None
        assert self.counts is not None
        above = np.maximum(self.maxes - self._means_when_on(), 0)
        return above * (self.counts > 1)


HIDDEN_ONLY = [
    "row",
    "id",
    "truncated",
    "hidden_scale",
    *(f"{s}_{name}" for s in SEGMENTS for name in ("tokens", "l1", "hidden")),
]
"""The columns that mean hidden states need."""
MEANS_ONLY = [*HIDDEN_ONLY, "latent_scale", *(f"{s}_mean" for s in SEGMENTS), "latents"]
"""The columns that mean pooling needs."""


def _scale(*arrays: np.ndarray) -> float:
    """Return the power of two that brings the largest value to the top of the 16-bit floats.

    Some models' values are past their end (Gemma 3), some so small that digits would be lost.
    """
    largest = max(float(np.abs(values).max(initial=0)) for values in arrays)
    return 2.0 ** np.clip(np.floor(np.log2(_HALF_MAX / largest)), -100, 100) if largest else 1.0


def _unscaled(values: np.ndarray, scale: np.ndarray, indptr: np.ndarray) -> np.ndarray:
    """Divide each row's entries by its scale, in place."""
    if len(scale) and (scale == scale[0]).all():  # rows of one shard: no array of all the divisors
        values *= 1 / scale[0]
    else:
        values /= np.repeat(scale, np.diff(indptr))[:, None]
    return values


def _rounded(values: np.ndarray, bits: int) -> np.ndarray:
    """Round values >= 0 to so many binary digits, as 16-bit floats."""
    raw, dropped = values.astype(np.float16).view(np.uint16), 10 - bits
    return ((raw + (1 << dropped - 1)) >> dropped << dropped).astype(np.uint16).view(np.float16)


def _flat(column: pa.ChunkedArray) -> np.ndarray:
    return column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
