"""FeatureIndex: a pool's pooled latents on disk, read as a stream.

    shards/00000.parquet   rows in pool order: pooled latents, hidden states, messages
    background.parquet     rows sampled evenly over the pool, to compare with
    stats.safetensors      what each latent does over the pool
    lexical.sqlite         BM25 over the texts
    rejected.parquet       rows that could not be read, with reasons
    manifest.json          written last

A new description costs one pass over the shards and no model. Rows are numbered by their place in
the index, 0 to num_rows - 1.
"""

import contextlib
import dataclasses
import shutil
import sqlite3
import tempfile
import weakref
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem
from jaxtyping import Bool, Float32, Int32
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors

from sae_ray.artifacts import Manifest, Source, locate, open_artifact, read_file
from sae_ray.chat import Conversation
from sae_ray.curate.block import HIDDEN_ONLY, MEANS_ONLY, SEGMENTS, IndexBlock
from sae_ray.curate.lexical import LexicalIndex
from sae_ray.curate.scorer import LatentScorer, ScorerConfig
from sae_ray.curate.sources import ROLES, Role, describe_source, locate_source, require_source
from sae_ray.curate.space import HiddenSpace
from sae_ray.errors import ArtifactError
from sae_ray.storage import explain_storage

KIND = "feature-index"
_READERS = 2
"""Shards that are read at once: each waits for its turn in memory."""
T = TypeVar("T")

FEATURES_ONLY = [*MEANS_ONLY, *(f"{s}_{name}" for s in SEGMENTS for name in ("peak", "count"))]


def shard_name(shard: int) -> str:
    """Return the name of a shard's file in the index."""
    return f"shards/{shard:05d}.parquet"


def ahead(read: Callable[[int], T], shards: Iterable[int]) -> Iterator[T]:
    """Yield `read(shard)` in order; the next ones are read on threads meanwhile."""
    with ThreadPoolExecutor(_READERS) as readers:
        coming: deque[Future[T]] = deque()
        for shard in shards:
            coming.append(readers.submit(read, shard))
            if len(coming) > _READERS:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()


@contextlib.contextmanager
def _whole(path: str) -> Iterator[None]:
    """Turn a file that is lost or damaged into an error that says what to do."""
    try:
        yield
    except (FileNotFoundError, SafetensorError, pa.ArrowException, sqlite3.Error) as error:
        raise ArtifactError(
            f"the index {path} has lost a file, or one is damaged ({error}): delete the index and "
            "make it again"
        ) from error


@dataclasses.dataclass(frozen=True)
class LatentStats:
    """What each latent does over the pool's content tokens."""

    document_frequency: Float32[np.ndarray, " d_sae"]
    """Share of rows in which it is on at all."""
    p99_on: Float32[np.ndarray, " d_sae"]
    """99th percentile of a row's maximum, over background rows in which it is on."""
    on_threshold: Float32[np.ndarray, " d_sae"]
    """80th percentile of a row's mean, over all background rows."""
    template_share: Float32[np.ndarray, " d_sae"]
    """Share of the tokens at which it is on that are the chat template's."""


@dataclasses.dataclass(frozen=True)
class Shards:
    """The shards of an index in order, less the rows that are excluded."""

    path: str
    num_shards: int
    d_sae: int
    excluded: frozenset[int] = frozenset()
    """Row numbers in the pool: duplicates that were found when all shards were there."""

    def tables(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Stream tables of these columns, a shard at a time."""
        yield from ahead(lambda shard: self._table(shard, columns), range(self.num_shards))

    def blocks(
        self,
        columns: Sequence[str] = FEATURES_ONLY,
        only: Bool[np.ndarray, " d_sae"] | None = None,
    ) -> Iterator[IndexBlock]:
        """Stream blocks, a shard at a time; `MEANS_ONLY` columns are read in half the time."""

        def read(shard: int) -> IndexBlock | None:
            table = self._table(shard, columns)
            return IndexBlock.from_table(table, self.d_sae, only) if table.num_rows else None

        start = 0
        for block in ahead(read, range(self.num_shards)):
            if block is not None:
                yield dataclasses.replace(block, rows=np.arange(start, start + len(block)))
                start += len(block)

    def take(self, shard: int, positions: Sequence[int], columns: Sequence[str]) -> pa.Table:
        """Read some rows of one shard, and no row group in which there are none."""
        with self._opened(shard) as file:
            positions = self._physical(file, positions)
            ends = list(
                accumulate(file.metadata.row_group(g).num_rows for g in range(file.num_row_groups))
            )
            groups = sorted({bisect_right(ends, position) for position in positions})
            wanted = list({"row": 0, **dict.fromkeys(columns)})
            table = file.read_row_groups(groups, columns=wanted, use_threads=False)
        starts = dict(zip(groups, [0, *accumulate(self._sizes(ends, groups))], strict=False))
        before = {g: (ends[g - 1] if g else 0) for g in groups}
        where = [starts[g] + p - before[g] for p in positions for g in [bisect_right(ends, p)]]
        return table.take(pa.array(where, pa.int64()))

    @staticmethod
    def _sizes(ends: list[int], groups: list[int]) -> list[int]:
        return [ends[g] - (ends[g - 1] if g else 0) for g in groups]

    @contextlib.contextmanager
    def _opened(self, shard: int) -> Iterator[pq.ParquetFile]:
        fs, root = locate(self.path)
        name = f"{root}/{shard_name(shard)}"
        with _whole(self.path), contextlib.ExitStack() as stack:
            local = isinstance(fs, LocalFileSystem)
            opened = pa.memory_map(name) if local else fs.open(name, "rb")
            yield pq.ParquetFile(stack.enter_context(opened))

    def _table(self, shard: int, columns: Sequence[str]) -> pa.Table:
        with self._opened(shard) as file:
            wanted = list({"row": 0, **dict.fromkeys(columns)})
            return self._without_excluded(file.read(columns=wanted, use_threads=False))

    def _physical(self, file: pq.ParquetFile, positions: Sequence[int]) -> list[int]:
        """Turn positions among the rows that are kept into positions in the file."""
        if not self.excluded:
            return list(positions)
        rows = file.read(columns=["row"])["row"].to_pylist()
        kept = [i for i, row in enumerate(rows) if row not in self.excluded]
        return [kept[position] for position in positions]

    def _without_excluded(self, table: pa.Table) -> pa.Table:
        rows = table["row"].to_pylist() if self.excluded else []
        if not any(row in self.excluded for row in rows):
            return table
        kept = [i for i, row in enumerate(rows) if row not in self.excluded]
        return table.take(pa.array(kept, pa.int64()))


class FeatureIndex:
    """A finished index, opened for reading; little is held in memory beside ids and lengths."""

    def __init__(self, path: str, lm: str | None = None, sae: str | None = None) -> None:
        """Open an index.

        Args:
            path: its folder or URL.
            lm: where a copy of its language model lies, if not where the index says.
            sae: the same of its SAE.

        Raises:
            ArtifactError: there is none, or it is not finished.
        """
        self.path = path
        self.manifest: Manifest = open_artifact(path, KIND)
        given: dict[Role, str | None] = {"lm": lm, "sae": sae}
        self.moved = {
            role: source.name
            for role, name in given.items()
            if name is not None and (source := describe_source(role, name)) != self._source(role)
        }
        extra = self.manifest.extra
        self.num_rows, self.d_sae, self.d_in = (
            int(extra[name])  # pyright: ignore[reportArgumentType]
            for name in ("num_rows", "d_sae", "d_in")
        )
        with _whole(path):
            tensors = load_tensors(self._bytes("stats.safetensors"))
        excluded = frozenset(tensors.pop("excluded").tolist())
        fields = dataclasses.fields(LatentStats)
        self.stats = LatentStats(**{field.name: tensors[field.name] for field in fields})
        self._shards = Shards(path, int(extra["num_shards"]), self.d_sae, excluded)  # pyright: ignore

    @cached_property
    def _light(self) -> pa.Table:
        columns = ["id", *(f"{segment}_tokens" for segment in SEGMENTS)]
        tables = list(self._shards.tables(columns))
        self._starts = list(accumulate((t.num_rows for t in tables), initial=0))
        return pa.concat_tables(tables)

    @cached_property
    def ids(self) -> list[str]:
        """Id of every row."""
        return self._light["id"].to_pylist()

    @cached_property
    def n_tokens(self) -> Int32[np.ndarray, "num_rows 2"]:
        """Content tokens of every row's prompt and response."""
        return np.stack([self._light[f"{s}_tokens"].to_numpy() for s in SEGMENTS], axis=1)

    @cached_property
    def background(self) -> IndexBlock:
        """Return rows sampled evenly over the pool."""
        with _whole(self.path):
            table = pq.read_table(pa.BufferReader(self._bytes("background.parquet")))
        return IndexBlock.from_table(table, self.d_sae)

    @cached_property
    def space(self) -> HiddenSpace:
        """Return the space of mean hidden states, fitted on the background."""
        return HiddenSpace.fit(self.background)

    def blocks(
        self, *, means_only: bool = False, only: Bool[np.ndarray, " d_sae"] | None = None
    ) -> Iterator[IndexBlock]:
        """Stream all rows, a shard at a time; with the entries of some latents `only`, faster."""
        return self._shards.blocks(MEANS_ONLY if means_only else FEATURES_ONLY, only)

    def take(self, rows: Sequence[int] | np.ndarray, *, means_only: bool = False) -> IndexBlock:
        """Return these rows in the order given; means alone are read in half the time."""
        rows = np.asarray(rows, dtype=np.int64)
        columns = MEANS_ONLY if means_only else FEATURES_ONLY
        block = IndexBlock.from_table(self._take(rows, columns), self.d_sae)
        return dataclasses.replace(block, rows=rows)

    def take_hidden(self, rows: Sequence[int] | np.ndarray) -> IndexBlock:
        """Return these rows in the order given without their latents, in a fraction of the time."""
        rows = np.asarray(rows, dtype=np.int64)
        block = IndexBlock.from_table(self._take(rows, HIDDEN_ONLY), self.d_sae)
        return dataclasses.replace(block, rows=rows)

    def conversations(self, rows: Sequence[int] | np.ndarray) -> list[Conversation]:
        """Return the conversations of these rows in the order given."""
        table = self._take(np.asarray(rows, dtype=np.int64), ["id", "messages"])
        pairs = zip(table["id"].to_pylist(), table["messages"].to_pylist(), strict=True)
        return [Conversation(one, messages) for one, messages in pairs]

    @property
    def kept_columns(self) -> list[str]:
        """Columns of the pool that were carried along for display."""
        return list(self.manifest.extra["columns"])  # pyright: ignore

    def column(self, name: str) -> list[str]:
        """Return a column that was carried along, for every row: for display, never for scores."""
        assert name in self.kept_columns
        return [one for table in self._shards.tables([name]) for one in table[name].to_pylist()]

    def lexical_scores(self, query: str | Mapping[str, float]) -> Float32[np.ndarray, " num_rows"]:
        """Return the BM25 score of every row, 0 where no term occurs; terms may carry weights."""
        return self._lexical.scores(query)

    def request_scores(self, query: str | Mapping[str, float]) -> Float32[np.ndarray, " num_rows"]:
        """Return BM25 over the first and last words of prompts: where people say what they want."""
        return self._lexical.scores(query, "request")

    def describe(self, text: str) -> IndexBlock:
        """Read a description as a user would say it: a block of one row."""
        described = Conversation("description", [{"role": "user", "content": text}])
        return self.scorer([described], [0]).block

    @cached_property
    def scorer(self) -> LatentScorer:
        """The scorer that made the index, loaded when it is first needed."""
        require_source("lm", self.source("lm"), self.manifest, self.path)
        require_source("sae", self.source("sae"), self.manifest, self.path)
        names = {field.name for field in dataclasses.fields(ScorerConfig)} - set(ROLES)
        config = {k: v for k, v in self.manifest.config.items() if k in names}
        lm, sae = locate_source("lm", self.source("lm")), locate_source("sae", self.source("sae"))
        if not Path(lm).is_dir():
            lm = self.manifest.parents["lm"]  # on the hub: at the revision that read the pool
        return LatentScorer.load(ScorerConfig(lm, sae, **config))  # pyright: ignore[reportArgumentType]

    def source(self, role: Role) -> str:
        """Return the name of the pool, model or SAE that it was made with, or that of a copy."""
        return self.moved.get(role) or self._source(role).name

    def _source(self, role: Role) -> Source:
        # An index of rows that no model read names none.
        return self.manifest.sources.get(role, Source(name=""))

    @cached_property
    def _lexical(self) -> LexicalIndex:
        fs, root = locate(self.path)
        if isinstance(fs, LocalFileSystem):
            with _whole(self.path):
                return LexicalIndex(f"{root}/lexical.sqlite", self.num_rows)
        folder = tempfile.mkdtemp(prefix="sae-ray-")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        with _whole(self.path), explain_storage(self.path):
            fs.get_file(f"{root}/lexical.sqlite", f"{folder}/lexical.sqlite")
        return LexicalIndex(f"{folder}/lexical.sqlite", self.num_rows)

    def _take(self, rows: np.ndarray, columns: Sequence[str]) -> pa.Table:
        assert self._light.num_rows == self.num_rows
        if not len(rows):
            return self._shards.take(0, [], columns)
        shards = np.searchsorted(self._starts, rows, side="right") - 1
        order = np.argsort(shards, kind="stable")

        def read(shard: int) -> pa.Table:
            here = rows[shards == shard] - self._starts[shard]
            return self._shards.take(shard, here.tolist(), columns)

        tables = list(ahead(read, np.unique(shards).tolist()))
        return pa.concat_tables(tables).take(pa.array(np.argsort(order)))

    def _bytes(self, name: str) -> bytes:
        return read_file(f"{self.path}/{name}")
