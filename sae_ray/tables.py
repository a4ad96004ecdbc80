"""Parquet and JSONL files: cut into slices of rows, and a slice read back as raw rows.

Parquet is cut by its footer, JSONL by one pass over its line ends; memory stays flat whatever
the size of files, row groups and lines. What a single row is like is not checked here: a row
comes back as a dict of its columns, or as the `BadRow` that says why it cannot be decoded.
"""

import codecs
import dataclasses
import hashlib
import json
import threading
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, islice, pairwise
from typing import Literal

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from sae_ray.errors import PoolError
from sae_ray.rows import FORMS, BadRow, Forms, excerpt, find_form, forms_text
from sae_ray.storage import storage_errors

Kind = Literal["parquet", "jsonl"]

SOURCES_TEXT = "a .parquet or .jsonl file, a folder or glob of them, or a dataset name"
MAX_LINE_BYTES = 64 << 20
"""Longest JSONL line that is read."""

_CHUNK_BYTES = 4 << 20
_HASHED_LOCAL_BYTES, _HASHED_BYTES = 4 << 30, 64 << 20
_BATCH_ROWS = 256
_local = threading.local()


@dataclasses.dataclass(frozen=True, slots=True)
class Slice:
    """A fixed range of rows in one file: small, and JSON by `dataclasses.asdict`."""

    index: int
    first_row: int
    """Number of the first row, in the file at first and in the pool once planned."""
    num_rows: int
    path: str
    kind: Kind
    start: int
    """First row in the file (parquet) or first byte (jsonl)."""
    stop: int
    """One past the last."""
    file_bytes: int
    """Size of the file when it was cut: another size is another file."""


@dataclasses.dataclass(frozen=True, slots=True)
class Table:
    """One file, cut."""

    content_hash: str
    columns: tuple[str, ...]
    """Of JSONL those of its first rows."""
    slices: list[Slice]


def cut(fs: AbstractFileSystem, path: str, rows_per_slice: int, *, forms: Forms = FORMS) -> Table:
    """Cut a file into slices of at most so many rows.

    Raises:
        PoolError: it is neither Parquet nor JSONL, or no row has a known form.
    """
    url = url_of(fs, path)
    with explained(url):
        num_bytes = int(fs.size(path) or 0)
        head = read_bytes(fs, path, 0, min(4, num_bytes)) if num_bytes else b""
        if head == b"PAR1":
            return _cut_parquet(fs, path, num_bytes, rows_per_slice, forms)
        if path.lower().endswith((".parquet", ".pq")):
            raise PoolError(
                f"{url} is no Parquet file ({num_bytes:,} bytes, begins with {head!r}): a Parquet "
                "file begins with PAR1; copy it again, or give it its true ending"
            )
        return _cut_lines(fs, path, num_bytes, rows_per_slice, forms)


def read_rows(
    part: Slice, keep_columns: Sequence[str] = ()
) -> Iterator[dict[str, object] | BadRow]:
    """Yield the rows of a slice: of Parquet only the columns of the forms, the id and those kept.

    Raises:
        PoolError: the file has gone, or is not the one that was cut.
    """
    with explained(part.path):
        fs, path = fsspec.core.url_to_fs(part.path)
        if fs.size(path) != part.file_bytes:
            raise _changed(part)
        if part.kind == "parquet":
            raw = _parquet_rows(fs, path, part, keep_columns)
        else:
            raw = _json_rows(fs, path, part)
        num_rows = 0
        for row in raw:
            num_rows += 1
            yield row
        if num_rows != part.num_rows:
            raise _changed(part)


def url_of(fs: AbstractFileSystem, path: str) -> str:
    """Return the address under which any worker finds a file."""
    return path if isinstance(fs, LocalFileSystem) else str(fs.unstrip_protocol(path))


def _cut_parquet(
    fs: AbstractFileSystem, path: str, num_bytes: int, rows_per_slice: int, forms: Forms
) -> Table:
    with _open_parquet(fs, path) as file:
        rows, columns = file.metadata.num_rows, tuple(file.schema_arrow.names)
    if find_form(columns, forms) is None:
        raise _wrong_schema(url_of(fs, path), columns, forms)
    edges = [*range(0, rows, rows_per_slice), rows]
    slices = [
        Slice(i, start, stop - start, url_of(fs, path), "parquet", start, stop, num_bytes)
        for i, (start, stop) in enumerate(pairwise(edges))
    ]
    return Table(hash_file(fs, path), columns, slices)


def _cut_lines(
    fs: AbstractFileSystem, path: str, num_bytes: int, rows_per_slice: int, forms: Forms
) -> Table:
    columns = _line_columns(fs, path, num_bytes, forms) if num_bytes else ()
    digest = hashlib.sha256()
    starts, lines, at, last = [0], 0, 0, b"\n"
    for chunk in _chunks(fs, path, 0, num_bytes):
        digest.update(chunk)
        ends = np.flatnonzero(np.frombuffer(chunk, dtype=np.uint8) == ord("\n"))
        first = -(lines + 1) % rows_per_slice
        starts.extend((at + ends[first::rows_per_slice] + 1).tolist())
        lines, at, last = lines + len(ends), at + len(chunk), chunk[-1:]
    lines += last != b"\n"  # the last line needs no end
    edges = [start for start in starts if start < num_bytes] + [num_bytes]
    counts = [*range(0, lines, rows_per_slice), lines]
    slices = [
        Slice(i, row, end_row - row, url_of(fs, path), "jsonl", start, stop, num_bytes)
        for i, ((row, end_row), (start, stop)) in enumerate(
            zip(pairwise(counts), pairwise(edges), strict=True)
        )
    ]
    return Table(digest.hexdigest(), columns, slices)


def _line_columns(
    fs: AbstractFileSystem, path: str, num_bytes: int, forms: Forms
) -> tuple[str, ...]:
    """Look at the first rows; refuse a file in which none has a known form."""
    url = url_of(fs, path)
    sample = read_bytes(fs, path, 0, min(num_bytes, _CHUNK_BYTES))
    lines = list(_lines([sample]))
    whole = lines if len(sample) == num_bytes else lines[:-1]
    parsed = (_parse(line, is_first=i == 0) for i, line in enumerate(whole))
    objects = list(islice((row for row in parsed if not isinstance(row, BadRow)), 100))
    columns = tuple(dict.fromkeys(name for row in objects for name in row))
    if sample.lstrip()[:1] == b"[" and _end(fs, path, num_bytes) == b"]":
        raise PoolError(
            f"{url} is one JSON list: needed is one object a line; "
            f"convert it, as with: jq -c '.[]' {url} > pool.jsonl"
        )
    if not whole or any(find_form(row, forms) for row in objects):
        return columns
    if objects:
        raise _wrong_schema(url, columns, forms)
    raise PoolError(
        f"{url} is neither Parquet nor JSONL: none of its first {len(whole):,} lines is a JSON "
        f"object (it begins with {sample[:40]!r}); give {SOURCES_TEXT}"
    )


def _end(fs: AbstractFileSystem, path: str, num_bytes: int) -> bytes:
    return read_bytes(fs, path, max(0, num_bytes - 64), num_bytes).rstrip()[-1:]


def _wrong_schema(url: str, columns: Sequence[str], forms: Forms) -> PoolError:
    return PoolError(
        f"{url} has the columns {excerpt(', '.join(columns))}: needed are those of one of these "
        f"forms: {forms_text(forms)}; rename its columns or convert it"
    )


def read_bytes(fs: AbstractFileSystem, path: str, start: int, stop: int) -> bytes:
    """Read a range of bytes by one exact request, which has no read-ahead to waste."""
    data = fs.cat_file(path, start=start, end=stop)
    assert isinstance(data, bytes)
    return data


def hash_file(fs: AbstractFileSystem, path: str) -> str:
    """Hash the contents, or what stands in for them where reading them would take long."""
    digest, num_bytes = hashlib.sha256(), int(fs.size(path) or 0)
    if num_bytes <= (_HASHED_LOCAL_BYTES if isinstance(fs, LocalFileSystem) else _HASHED_BYTES):
        for chunk in _chunks(fs, path, 0, num_bytes):
            digest.update(chunk)
        return digest.hexdigest()
    info = fs.info(path)
    stamps = [str(info[key]) for key in ("ETag", "etag", "md5Hash", "content_md5") if key in info]
    digest.update(json.dumps([num_bytes, stamps]).encode())
    digest.update(read_bytes(fs, path, 0, _CHUNK_BYTES))
    digest.update(read_bytes(fs, path, num_bytes - _CHUNK_BYTES, num_bytes))
    return digest.hexdigest()


def _chunks(fs: AbstractFileSystem, path: str, start: int, stop: int) -> Iterator[bytes]:
    for at in range(start, stop, _CHUNK_BYTES):
        yield read_bytes(fs, path, at, min(at + _CHUNK_BYTES, stop))


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Split at line ends; of a line that is too long only the beginning is kept."""
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines
        rest = rest[: MAX_LINE_BYTES + 1]
    if rest:
        yield rest


def _parse(line: bytes, *, is_first: bool) -> dict[str, object] | BadRow:
    """Read one line, or say why it cannot be read."""
    if is_first:
        line = line.removeprefix(codecs.BOM_UTF8)
    if len(line) > MAX_LINE_BYTES:
        return BadRow(f"line is longer than {MAX_LINE_BYTES:,} bytes", excerpt(line[:200]))
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return BadRow("not valid UTF-8", excerpt(line[max(0, error.start - 40) :][:200]))
    except RecursionError:
        return BadRow("JSON nested too deeply", excerpt(line[:200]))
    except ValueError as error:
        reason = "not valid JSON" if line.strip() else "blank line"
        return BadRow(reason, excerpt(f"{error}: {line[:200].decode(errors='replace')}"))
    if not isinstance(row, dict):
        return BadRow("not a JSON object", excerpt(line[:200].decode(errors="replace")))
    return row


def _json_rows(
    fs: AbstractFileSystem, path: str, part: Slice
) -> Iterator[dict[str, object] | BadRow]:
    for i, line in enumerate(_lines(_chunks(fs, path, part.start, part.stop))):
        yield _parse(line, is_first=part.start == 0 and i == 0)


def _parquet_rows(
    fs: AbstractFileSystem, path: str, part: Slice, keep_columns: Sequence[str]
) -> Iterator[dict[str, object] | BadRow]:
    key = (part.path, part.file_bytes, tuple(keep_columns))
    cursor: _Cursor | None = getattr(_local, "cursor", None)
    if cursor is None or cursor.key != key:
        if cursor is not None:
            cursor.file.close()
        cursor = _local.cursor = _Cursor(fs, path, key)
    for batch in cursor.take(part.start, part.stop):
        try:
            yield from batch.to_pylist()
        except UnicodeDecodeError:  # Parquet does not check the text it holds
            for i in range(batch.num_rows):
                yield _decode(batch.slice(i, 1))


def _decode(row: pa.RecordBatch) -> dict[str, object] | BadRow:
    try:
        return row.to_pylist()[0]
    except UnicodeDecodeError as error:
        return BadRow("not valid UTF-8", excerpt(str(error)))


class _Cursor:
    """One Parquet file read from front to back, kept open between slices.

    Row groups may be far larger than slices or memory, so they are streamed and never held: the
    next slice goes on where the last one ended, and skipping ahead decodes but does not keep.
    """

    def __init__(
        self, fs: AbstractFileSystem, path: str, key: tuple[str, int, tuple[str, ...]]
    ) -> None:
        self.key = key
        self.file = _open_parquet(fs, path)
        groups = range(self.file.num_row_groups)
        counts = (self.file.metadata.row_group(i).num_rows for i in groups)
        self.group_starts = list(accumulate(counts, initial=0))
        wanted = {"id", "input", *(name for form in FORMS for name in form), *key[2]}
        self.columns = [name for name in self.file.schema_arrow.names if name in wanted]
        self.at = -1
        self.rest: pa.RecordBatch | None = None
        self.batches: Iterator[pa.RecordBatch] = iter(())

    def take(self, start: int, stop: int) -> Iterator[pa.RecordBatch]:
        """Yield rows [start, stop) of the file."""
        group = bisect_right(self.group_starts, start) - 1
        if not self.group_starts[group] <= self.at <= start:
            self._seek(group)
        while self.at < stop:
            batch = self.rest if self.rest is not None else next(self.batches, None)
            if batch is None:
                return  # a shorter file than was cut: the caller counts
            skipped = min(max(start - self.at, 0), batch.num_rows)
            used = batch.slice(skipped, stop - self.at - skipped)
            self.at += skipped + used.num_rows
            left = batch.slice(skipped + used.num_rows)
            self.rest = left if left.num_rows else None
            if used.num_rows:
                yield used

    def _seek(self, group: int) -> None:
        groups = list(range(group, self.file.num_row_groups))
        self.at, self.rest = self.group_starts[group], None
        self.batches = self.file.iter_batches(_BATCH_ROWS, groups, self.columns, use_threads=False)


def _open_parquet(fs: AbstractFileSystem, path: str) -> pq.ParquetFile:
    # Pre-buffering would hold whole row groups, and so would fsspec's read-ahead for each column.
    local = isinstance(fs, LocalFileSystem)
    source = path if local else fs.open(path, "rb", cache_type="none")
    return pq.ParquetFile(source, buffer_size=_CHUNK_BYTES, pre_buffer=False)


def _changed(part: Slice) -> PoolError:
    return PoolError(
        f"{part.path} is not the file that was planned ({part.file_bytes:,} bytes, "
        f"{part.num_rows:,} rows from {part.start:,}): a pool must not change while it is read; "
        "start again"
    )


@contextmanager
def explained(url: str) -> Iterator[None]:
    """Turn what storage and decoders raise into one sentence."""
    try:
        yield
    except (pa.ArrowException, *storage_errors()) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise PoolError(
            f"pool {url} cannot be read ({line}): needed is {SOURCES_TEXT} that this machine may "
            "read; check the address, the rights, and for remote storage its environment variables"
        ) from error
