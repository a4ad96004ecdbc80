"""Pools that cannot be cut into slices, converted once to files that can be.

A gzip file has no way in but its beginning, and a dataset of the Hugging Face hub (or one saved
by its library) is no file at all. The first becomes JSONL, the second Parquet, each under a name
made from what it was made from: a second plan finds it there.

Importing `datasets` takes a second, so `sae_ray.pool` imports this module only when it must.
Dataset scripts are never run, and formats that would unpickle are refused.
"""

import dataclasses
import gzip
import hashlib
import json
import shutil
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, cast

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.exceptions import DatasetsError

from sae_ray.errors import PoolError
from sae_ray.rows import FORMS, Forms, find_form, forms_text

_ROW_GROUP_ROWS = 1024
_FORMATS = ("arrow", "csv", "json", "parquet", "text")


@dataclasses.dataclass(frozen=True, slots=True)
class DatasetName:
    """A Hugging Face dataset: a name on the hub, or a folder."""

    name: str
    config: str | None
    split: str | None
    saved: bool
    """True for a folder written by `save_to_disk`."""

    def __str__(self) -> str:
        config = f":{self.config}" if self.config else ""
        return f"{self.name}{config}" + (f"@{self.split}" if self.split else "")


def stage_gzip(url: str, content_hash: str, staging: str) -> str:
    """Unpack a gzip file of lines to JSONL and return where it is."""
    target = f"{staging.rstrip('/')}/{content_hash[:16]}.jsonl"
    try:
        with (
            fsspec.open(url, "rb") as packed,
            gzip.open(cast(BinaryIO, packed)) as lines,
            _written_once(url, target) as out,
        ):
            if out is not None:
                shutil.copyfileobj(lines, out, 1 << 20)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise PoolError(
            f"{url} is not a whole gzip file ({error}): a .gz pool holds one JSON object a line; "
            "copy or compress it again"
        ) from error
    return target


def stage_dataset(source: DatasetName, staging: str, forms: Forms = FORMS) -> str:
    """Write a dataset's conversations to Parquet and return where it is."""
    try:
        batches, version = _load_saved(source) if source.saved else _load(source)
        target = f"{staging.rstrip('/')}/{_digest(str(source), version)}.parquet"
        with _written_once(str(source), target) as out:
            if out is not None:
                _write_parquet(source, batches, out, forms)
    except (OSError, ValueError, DatasetsError) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise PoolError(
            f"pool {source}: there is no such file or folder, and as a Hugging Face dataset it "
            f"cannot be read ({line}): give a path or URL that exists, or name[:config][@split] of "
            "a dataset that this machine can reach"
        ) from error
    return target


def _load_saved(source: DatasetName) -> tuple[Iterator[pa.Table], str]:
    loaded = datasets.load_from_disk(source.name)
    if isinstance(loaded, datasets.DatasetDict):
        loaded = loaded[_choose_split(source, list(map(str, loaded)))]
    elif source.split is not None:
        raise ValueError(f"it has no splits, so @{source.split} means nothing")
    batches = loaded.with_format("arrow").iter(batch_size=_ROW_GROUP_ROWS)
    return cast(Iterator[pa.Table], batches), loaded._fingerprint


def _load(source: DatasetName) -> tuple[Iterator[pa.Table], str]:
    builder = datasets.load_dataset_builder(source.name, source.config)
    if builder.info.builder_name not in _FORMATS:
        raise ValueError(
            f"its files are of the kind {builder.info.builder_name}, read are {', '.join(_FORMATS)}"
        )
    files = builder.config.data_files or {}
    split = _choose_split(source, list(map(str, builder.info.splits or files)))
    # Streaming: only the columns that are kept land on the disk, and only once.
    stream = builder.as_streaming_dataset(split=split)
    assert isinstance(stream, datasets.IterableDataset)
    batches = stream.with_format("arrow").iter(batch_size=_ROW_GROUP_ROWS)
    version = [split, builder.hash, [getattr(files[key], "origin_metadata", "") for key in files]]
    return cast(Iterator[pa.Table], batches), json.dumps(version, default=str)


def _choose_split(source: DatasetName, splits: list[str]) -> str:
    """Take the split that was named, else the only one, else `train`."""
    split = source.split or (splits[0] if len(splits) == 1 else "train")
    if split not in splits:
        raise ValueError(f"its splits are {', '.join(splits)}; name one with @split")
    return split


def _write_parquet(
    source: DatasetName, batches: Iterator[pa.Table], out: BinaryIO, forms: Forms
) -> None:
    """Write the columns of the form, the id, and plain columns that may be reported."""
    writer: pq.ParquetWriter | None = None
    try:
        for batch in batches:
            if writer is None:
                schema = _kept_schema(source, batch.schema, forms)
                writer = pq.ParquetWriter(out, schema, compression="zstd")
            writer.write_table(batch.select(writer.schema.names).cast(writer.schema))
        if writer is None:
            raise PoolError(f"pool {source} is empty: at least one row is needed; name another")
    finally:
        if writer is not None:
            writer.close()


def _kept_schema(source: DatasetName, schema: pa.Schema, forms: Forms) -> pa.Schema:
    if find_form(schema.names, forms) is None:
        raise PoolError(
            f"pool {source} has the columns {', '.join(schema.names)}: needed are those of one of "
            f"these forms: {forms_text(forms)}; rename its columns or convert it"
        )
    used = {name for columns in FORMS for name in columns} | {"input"}
    return pa.schema([f for f in schema if f.name in used or not pa.types.is_nested(f.type)])


@contextmanager
def _written_once(source: str, url: str) -> Iterator[BinaryIO | None]:
    """Open a file that appears under its name only when whole; None if it is there already."""
    fs, path = fsspec.core.url_to_fs(url)
    if fs.exists(path):
        yield None
        return
    part = f"{path}.{uuid.uuid4().hex}.part"
    try:
        fs.makedirs(fs._parent(path), exist_ok=True)
        with fs.open(part, "wb") as out:
            yield cast(BinaryIO, out)
        fs.mv(part, path)
    except gzip.BadGzipFile:
        raise
    except OSError as error:
        raise PoolError(
            f"pool {source} could not be converted to {url} ({error}): the one must be readable, "
            "the other lie in a folder with room that every worker can read; choose another folder"
        ) from error
    finally:
        if fs.exists(part):
            fs.rm(part)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
