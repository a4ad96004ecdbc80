"""Conversations of a pool: Parquet, JSONL or a Hugging Face dataset, cut into fixed slices.

    plan(source) -> Plan(slices)      once, on the driver: footers and line ends, no contents
    read(slice)  -> SliceRows         anywhere: conversations, their row numbers, and the rejected

A slice is a fixed range of rows, and all work is done a slice at a time, so that no result
depends on the number of workers. Slices end where files end. Rows are numbered through the whole
pool in the order of the file names; for JSONL a row is a line, blank ones included.

Storage options of remote filesystems come from the environment (`AWS_ENDPOINT_URL` and the like).
"""

import dataclasses
import hashlib
import logging
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING

import fsspec
from fsspec import AbstractFileSystem
from fsspec.core import has_magic

from sae_ray.chat import Conversation
from sae_ray.errors import PoolError
from sae_ray.rows import FORMS, MAX_CHARS, BadRow, Forms, Rejected, excerpt, to_conversation
from sae_ray.tables import (
    SOURCES_TEXT,
    Slice,
    Table,
    cut,
    explained,
    hash_file,
    read_bytes,
    read_rows,
    url_of,
)

if TYPE_CHECKING:
    from sae_ray.staging import DatasetName

logger = logging.getLogger(__name__)

_SUFFIXES = {
    "parquet": (".parquet", ".pq"),
    "lines": (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz"),
    "json": (".json", ".json.gz"),
}
_NOTES = (".md", ".txt", ".json", ".html", "license", ".lock")
"""Endings of what lies beside data and is none."""
_DATASET = re.compile(
    r"(?P<name>\w[\w.-]*(/\w[\w.-]*)?)(:(?P<config>[\w.-]+))?(@(?P<split>[\w.-]+))?"
)
_SAVED_MARKS = ("state.json", "dataset_dict.json")


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """A pool, cut."""

    source: str
    fingerprint: str
    """SHA-256 over the contents of the files in order, wherever they lie. Of files too large to
    be read for it (4 GiB here, 64 MiB elsewhere) size, both ends and the store's own checksum
    stand in."""
    num_rows: int
    columns: tuple[str, ...]
    """Columns of the first file; of JSONL those of its first rows."""
    slices: tuple[Slice, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class SliceRows:
    """What a slice holds; every row of it is in `rows` or in `rejected`."""

    conversations: list[Conversation]
    rows: list[int]
    """Number in the pool of each conversation."""
    rejected: list[Rejected]
    columns: dict[str, list[str]]
    """The columns asked for, beside the conversations; "" where a row has none."""


def plan(
    source: str,
    *,
    rows_per_shard: int = 2048,
    staging: str | None = None,
    forms: Forms = FORMS,
) -> Plan:
    """Cut a pool into slices of at most `rows_per_shard` rows without reading its contents.

    Args:
        source: a Parquet or JSONL file, a folder or glob of them, on any fsspec URL; or
            `name[:config][@split]` of a Hugging Face dataset (its `train` split, if not named).
        rows_per_shard: the last slice of each file may be smaller.
        staging: folder that every worker can read, for what has to be converted first
            (.gz files and datasets).
        forms: columns that its rows may have.

    Raises:
        PoolError: the pool is missing, empty, unreadable, or of another schema.
    """
    assert rows_per_shard > 0
    fs, paths = _find(source, staging, forms)
    cut_one = partial(_cut, fs, rows_per_shard=rows_per_shard, staging=staging, forms=forms)
    with ThreadPoolExecutor(8) as threads:
        tables = list(threads.map(cut_one, paths))
    slices: list[Slice] = []
    num_rows = 0
    for part in (part for table in tables for part in table.slices):
        slices.append(dataclasses.replace(part, index=len(slices), first_row=num_rows))
        num_rows += part.num_rows
    if not slices:
        raise PoolError(f"pool {source} holds no rows: at least one is needed; give another pool")
    fingerprint = hashlib.sha256("\n".join(t.content_hash for t in tables).encode()).hexdigest()
    columns = next(table.columns for table in tables if table.slices)
    return Plan(source, fingerprint, num_rows, columns, tuple(slices))


def read(part: Slice, *, max_chars: int = MAX_CHARS, keep_columns: Sequence[str] = ()) -> SliceRows:
    """Read a slice. A bad row becomes a rejection with its reason, and the others are read.

    Args:
        part: one of the slices of a plan.
        max_chars: longest turn that is read.
        keep_columns: columns to carry along as text.

    Raises:
        PoolError: the file has gone, or is not the one that was planned.
    """
    result = SliceRows([], [], [], {name: [] for name in keep_columns})
    for number, row in enumerate(read_rows(part, keep_columns), part.first_row):
        try:
            if isinstance(row, BadRow):
                raise row
            conversation = to_conversation(row, max_chars=max_chars)
        except BadRow as bad:
            given = row.get("id") if isinstance(row, Mapping) else None
            given = None if given is None else excerpt(given)
            result.rejected.append(Rejected(number, given, bad.reason, bad.excerpt))
            continue
        result.conversations.append(conversation)
        result.rows.append(number)
        for name in keep_columns:
            value = row.get(name)
            result.columns[name].append("" if value is None else excerpt(value))
    return result


def _find(source: str, staging: str | None, forms: Forms) -> tuple[AbstractFileSystem, list[str]]:
    """Return the files of a pool, in order."""
    try:
        fs, path = fsspec.core.url_to_fs(source)
    except (ImportError, ValueError) as error:
        raise PoolError(
            f"pool {source!r} cannot be opened ({error}): read is {SOURCES_TEXT}, on any fsspec "
            "URL whose package is installed; install it or correct the address"
        ) from error
    with explained(source):
        fs.invalidate_cache()
        if source and fs.isfile(path):
            return fs, [path]
        dataset = _as_dataset(fs, source)
        if dataset is None and source and fs.isdir(path):
            return fs, _pick(source, path, fs.find(path))
        if dataset is None:
            found = sorted(map(str, fs.glob(path))) if has_magic(source) else []
            return fs, [p for p in found if fs.isfile(p)] or _missing(source)
    staged = _staging().stage_dataset(dataset, _needed(staging, source), forms)
    fs, path = fsspec.core.url_to_fs(staged)
    return fs, [path]


def _missing(source: str) -> list[str]:
    raise PoolError(f"pool {source!r} does not exist: give {SOURCES_TEXT}")


def _as_dataset(fs: AbstractFileSystem, source: str) -> "DatasetName | None":
    """Tell a dataset (saved folder, folder with a split, name on the hub) from plain files."""
    match = _DATASET.fullmatch(source)
    whole = bool(source) and fs.isdir(source)
    folder = source if whole else source.rpartition("@")[0]
    split = None if whole else source.rpartition("@")[2]
    if folder and fs.isdir(folder):
        saved = any(fs.exists(f"{folder}/{name}") for name in _SAVED_MARKS)
        if saved or split:
            return _staging().DatasetName(folder, None, split, saved)
        return None
    if match is None or _kind_of(source):
        return None
    return _staging().DatasetName(match["name"], match["config"], match["split"], saved=False)


def _kind_of(path: str) -> str | None:
    """Return parquet, lines or json by the end of a name."""
    return next((kind for kind, ends in _SUFFIXES.items() if path.lower().endswith(ends)), None)


def _pick(source: str, folder: str, paths: Sequence[str]) -> list[str]:
    """Choose a folder's files; `.json` counts only where it is not notes beside the data."""
    hidden = re.compile(r"/[._]")
    seen = [p for p in sorted(paths) if not hidden.search(p.removeprefix(folder.rstrip("/")))]
    by_kind = {kind: [p for p in seen if _kind_of(p) == kind] for kind in _SUFFIXES}
    if by_kind["parquet"] and by_kind["lines"]:
        raise PoolError(
            f"pool {source} holds Parquet and JSONL files: a pool is of one kind; "
            f"name one with a glob, as in {source.rstrip('/')}/*.parquet"
        )
    found = next((files for files in by_kind.values() if files), None)
    if found is None:
        raise PoolError(
            f"the folder {source} holds no pool: read are files that end in "
            f"{', '.join(e for ends in _SUFFIXES.values() for e in ends)}; give another folder"
        )
    if skipped := [p for p in seen if p not in found and not p.lower().endswith(_NOTES)]:
        logger.warning(
            "%d files of %s are not read, of which the first is %s: its ending is none of a pool's",
            *(len(skipped), source, skipped[0]),
        )
    return found


def _needed(staging: str | None, source: str) -> str:
    if staging is None:
        raise PoolError(
            f"pool {source} is no Parquet or plain JSONL file: .gz files and Hugging Face datasets "
            "are converted first, in a staging folder; give one, or correct the path"
        )
    return staging


def _staging() -> ModuleType:
    """Import the converter only when it is needed: with it comes `datasets`, a second's work."""
    from sae_ray import staging  # noqa: PLC0415

    return staging


def _cut(
    fs: AbstractFileSystem,
    path: str,
    *,
    rows_per_shard: int,
    staging: str | None,
    forms: Forms,
) -> Table:
    """Cut one file, unpacked first if it must be."""
    url = url_of(fs, path)
    with explained(url):
        if fs.size(path) and read_bytes(fs, path, 0, 2) == b"\x1f\x8b":
            plain = _staging().stage_gzip(url, hash_file(fs, path), _needed(staging, url))
            fs, path = fsspec.core.url_to_fs(plain)
    return cut(fs, path, rows_per_shard, forms=forms)
