"""Building an index: score slices of the pool into shards, then survey them once.

A shard is a fixed range of the pool's rows and is scored by itself, so that the index does not
depend on who wrote which shard, nor on how often the work was interrupted.

This module does not know how shards are given to workers.
"""

import dataclasses
import json
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import JsonValue
from safetensors.numpy import save as save_tensors

from sae_ray.artifacts import FileRecord, Manifest, finish, locate, write_atomically
from sae_ray.chat import STANDING_ROLES, Conversation
from sae_ray.curate.block import SEGMENTS, IndexBlock
from sae_ray.curate.index import Shards, shard_name
from sae_ray.curate.lexical import build
from sae_ray.curate.scorer import MIN_FIT_TOKENS, LatentScorer
from sae_ray.errors import ArtifactError, PoolError
from sae_ray.pool import Slice, read
from sae_ray.rows import Rejected, count_reasons
from sae_ray.storage import explain_storage

BACKGROUND_ROWS = 2048
ON_QUANTILE = 0.8
"""A latent is on in a row if its mean is among the top fifth of the pool's."""
FIT_ROWS, FIT_SLICES = 64, 256
"""Rows on which a SAE's fit is judged at once, and slices in which such rows are looked for."""
_ROW_GROUP_ROWS = 256
_SPLIT = ("_mean", "_peak", "_hidden", "_count")
_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_REJECTED = pa.schema(
    [("row", pa.int64()), ("id", pa.string()), ("reason", pa.string()), ("excerpt", pa.string())]
)


@dataclasses.dataclass(frozen=True)
class Fit:
    """How well the SAE fits the model, as far as it was judged."""

    unexplained_variance: float | None = None
    warning: str | None = None


def write_shard(
    scorer: LatentScorer,
    piece: Slice,
    path: str,
    keep_columns: Sequence[str] = (),
    fit_slices: Sequence[Slice] = (),
) -> dict:
    """Score one slice of the pool into the index at `path`, unless that is done; return its part.

    The part (counts, rejected rows, the shard's hash) is written behind the shard: where it is, the
    shard is whole.

    Args:
        scorer: what reads.
        piece: the slice.
        path: the index.
        keep_columns: columns of the pool to carry along.
        fit_slices: slices after the first, in which rows are looked for to hold the SAE against the
            model if the first has too few.
    """
    if (part := read_part(path, piece.index)) is not None:
        return part
    rows = read(piece, keep_columns=keep_columns)
    fit = _check_fit(scorer, rows.conversations, fit_slices) if piece.index == 0 else Fit()
    scored = scorer(rows.conversations, rows.rows)
    rejected = [
        *rows.rejected,
        *(
            Rejected(rows.rows[i], rows.conversations[i].id, reason, "")
            for i, reason in scored.unreadable.items()
        ),
    ]
    kept = [i for i in range(len(rows.rows)) if i not in scored.unreadable]
    table = scored.block.to_table().append_column(
        "messages", pa.array([rows.conversations[i].messages for i in kept], _MESSAGES)
    )
    for name in keep_columns:
        values = [rows.columns[name][i] for i in kept]
        table = table.append_column(name, pa.array(values, pa.string()))
    record = write_atomically(f"{path}/{shard_name(piece.index)}", _parquet(table))
    on_template = np.flatnonzero(scored.template_counts)
    part = {
        "shard": piece.index,
        "record": record.model_dump(),
        "fit": dataclasses.asdict(fit),
        "num_rows": table.num_rows,
        "num_tokens": int(scored.block.n_tokens.sum()) + scored.template_tokens,
        "template_latents": on_template.tolist(),
        "template_counts": scored.template_counts[on_template].tolist(),
        "rejected": [[r.row, r.id, r.reason, r.excerpt] for r in rejected],
    }
    write_atomically(f"{path}/.parts/{piece.index:05d}.json", json.dumps(part).encode())
    return part


def _check_fit(scorer: LatentScorer, first: Sequence[Conversation], slices: Sequence[Slice]) -> Fit:
    """Hold the SAE against the first rows that hold enough."""
    if scorer.encoder.is_transcoder:
        return Fit()
    later = (one for piece in slices for one in read(piece).conversations)
    rows = chain(first, later)
    while some := list(islice(rows, FIT_ROWS)):
        if (unexplained := scorer.check_fit(some)) is not None:
            return Fit(unexplained)
    return Fit(
        warning=f"whether the SAE fits the model was not judged: no {FIT_ROWS} of the pool's first "
        f"rows hold {MIN_FIT_TOKENS} tokens"
    )


def read_part(path: str, shard: int) -> dict | None:
    """Return what was written behind a finished shard, or None."""
    fs, root = locate(path)
    try:
        return json.loads(fs.cat_file(f"{root}/.parts/{shard:05d}.json"))
    except FileNotFoundError:
        return None


def _parts(path: str, num_shards: int) -> list[dict]:
    return [part for i in range(num_shards) if (part := read_part(path, i)) is not None]


def finish_index(
    path: str, num_shards: int, *, d_sae: int, max_rejected: float, columns: Sequence[str] = ()
) -> Manifest:
    """Survey an index that has all its shards; write statistics, lexical index and manifest.

    Args:
        path: the index.
        num_shards: how many there are.
        d_sae: latents of its SAE.
        max_rejected: share of rows that may be unreadable.
        columns: columns of the pool that its shards carry along.

    Raises:
        PoolError: more than the share `max_rejected` of the rows could not be read, or all.
    """
    parts = _parts(path, num_shards)
    assert len(parts) == num_shards, "an index is finished when every shard is written"
    unread = [Rejected(*row) for part in parts for row in part["rejected"]]
    num_read = sum(part["num_rows"] for part in parts)
    _refuse_bad_pool(unread, num_read + len(unread), max_rejected)
    duplicates = _duplicates(Shards(path, num_shards, d_sae))
    shards = Shards(path, num_shards, d_sae, frozenset(one.row for one in duplicates))
    num_rows = num_read - len(duplicates)
    rejected = sorted(unread + duplicates, key=lambda one: one.row)

    background, tallies = _survey(shards, num_rows)
    stats = _stats(background, tallies, _template_counts(parts, d_sae))
    stats["excluded"] = np.array(sorted(shards.excluded), dtype=np.int64)
    known = {shard_name(part["shard"]): FileRecord(**part["record"]) for part in parts}
    table = pa.Table.from_pylist([dataclasses.asdict(one) for one in rejected], _REJECTED)
    for name, content in (
        ("rejected.parquet", _parquet(table)),
        ("background.parquet", _parquet(background.to_table())),
        ("stats.safetensors", save_tensors(stats)),
    ):
        known[name] = write_atomically(f"{path}/{name}", content)
    _build_lexical(path, shards)
    counts: dict[str, JsonValue] = {
        "bytes_per_row": round(_num_bytes(path) / num_rows),
        "num_rows": num_rows,
        "num_rejected": len(rejected),
        "num_truncated": int(tallies["truncated"].item()),
        "num_tokens": sum(part["num_tokens"] for part in parts),
        "num_shards": num_shards,
        "d_sae": d_sae,
        "d_in": background.hidden.shape[2],
    }
    counts["rejected"] = dict(count_reasons(rejected).items())
    counts["columns"] = list(columns)
    fit = Fit(**parts[0].get("fit", {}))
    counts["unexplained_variance"] = fit.unexplained_variance
    return finish(path, counts, [fit.warning] if fit.warning else [], known)


def _num_bytes(path: str) -> int:
    fs, root = locate(path)
    return sum(fs.size(name) or 0 for name in fs.find(root) if "/." not in name[len(root) :])


def refuse_bad_pool(path: str, num_shards: int, num_rows: int, max_rejected: float) -> None:
    """Refuse a pool once the shards that are there hold more unreadable rows than it may have.

    Args:
        path: the index, as far as it is.
        num_shards: how many it will have.
        num_rows: rows of the pool.
        max_rejected: share of them that may be unreadable; a row whose id an earlier one has is
            left out and listed, but can be read and is not counted.

    Raises:
        PoolError: they are too many.
    """
    parts = _parts(path, num_shards)
    unread = [Rejected(*row) for part in parts for row in part["rejected"]]
    _refuse_bad_pool(unread, num_rows, max_rejected, "at least " * (len(parts) < num_shards))


def _refuse_bad_pool(
    unread: list[Rejected], num_rows: int, max_rejected: float, at_least: str = ""
) -> None:
    if len(unread) <= max_rejected * num_rows and len(unread) < num_rows:
        return
    reasons = "; ".join(f"{reason}: {n}" for reason, n in count_reasons(unread).items())
    first = min(unread, key=lambda one: one.row)
    raise PoolError(
        f"{at_least}{len(unread)} of {num_rows} rows of the pool cannot be read ({reasons}; the "
        f"first is row {first.row}{f', {first.excerpt!r}' if first.excerpt else ''}): at most "
        f"{max_rejected:.0%} may be rejected; mend the pool, or raise max_rejected"
    )


def _duplicates(shards: Shards) -> list[Rejected]:
    """Find rows whose id an earlier row has."""
    seen: dict[str, int] = {}
    found: list[Rejected] = []
    for table in shards.tables(["id"]):
        for row, one in zip(table["row"].to_pylist(), table["id"].to_pylist(), strict=True):
            if seen.setdefault(one, row) != row:
                found.append(Rejected(row, one, "id of an earlier row", f"row {seen[one]}"))
    return found


def _template_counts(parts: list[dict], d_sae: int) -> np.ndarray:
    counts = np.zeros(d_sae, dtype=np.int64)
    for part in parts:
        counts[part["template_latents"]] += part["template_counts"]
    return counts


def _survey(shards: Shards, num_rows: int) -> tuple[IndexBlock, dict[str, np.ndarray]]:
    """Stream all rows once: sample the background, and tally what each latent does."""
    sampled = np.unique(np.linspace(0, num_rows - 1, min(BACKGROUND_ROWS, num_rows)).astype(int))
    background: list[IndexBlock] = []
    tallies: Counter[str] = Counter()
    per_latent = {name: np.zeros(shards.d_sae, dtype=np.float64) for name in ("rows", "tokens")}
    for block in shards.blocks():
        assert block.counts is not None
        here = sampled[(sampled >= block.rows[0]) & (sampled <= block.rows[-1])]
        background.append(block.take(here - block.rows[0]))
        tallies["num_rows"] += len(block)
        tallies["truncated"] += int(block.truncated.sum())
        per_latent["rows"] += np.bincount(block.latents, minlength=shards.d_sae)
        tokens = block.counts.sum(1)
        per_latent["tokens"] += np.bincount(block.latents, tokens, minlength=shards.d_sae)
    counted = {name: np.array(count) for name, count in tallies.items()}
    return IndexBlock.concatenate(background), per_latent | counted


def _stats(
    background: IndexBlock, tallies: dict[str, np.ndarray], template_counts: np.ndarray
) -> dict[str, np.ndarray]:
    """Return the fields of `LatentStats`."""
    tokens = tallies["tokens"]
    means, maxes = background.pooled("mean").tocsc(), background.pooled("max").tocsc()
    thresholds = np.zeros(background.d_sae)
    p99 = np.zeros(background.d_sae)
    off = 1 - np.diff(means.indptr) / len(background)
    for latent in range(background.d_sae):
        on = slice(means.indptr[latent], means.indptr[latent + 1])
        if on.start == on.stop:
            continue
        p99[latent] = np.quantile(maxes.data[on], 0.99)
        # The quantile over all rows, of which a share `off` holds 0.
        if off[latent] < ON_QUANTILE:
            among_on = (ON_QUANTILE - off[latent]) / (1 - off[latent])
            thresholds[latent] = np.quantile(means.data[on], among_on)
    stats = {
        "document_frequency": tallies["rows"] / tallies["num_rows"],
        "p99_on": p99,
        "on_threshold": thresholds,
        "template_share": template_counts / np.maximum(template_counts + tokens, 1),
    }
    return {name: values.astype(np.float32) for name, values in stats.items()}


def _build_lexical(path: str, shards: Shards) -> None:
    """Build the lexical index on a local disk, where SQLite must work, and move it in place."""
    fs, root = locate(path)
    with tempfile.TemporaryDirectory(prefix="sae-ray-") as folder:
        local = Path(folder) / "lexical.sqlite"
        try:
            build(local, _texts(shards))
        except sqlite3.OperationalError as error:
            raise ArtifactError(
                f"the lexical index cannot be built in {folder} ({error}): free some room there or "
                "set TMPDIR to a folder that has it, then run the same command again; it continues "
                "where it stopped"
            ) from error
        with explain_storage(path):
            fs.put_file(str(local), f"{root}/lexical.sqlite")


def _texts(shards: Shards) -> Iterator[tuple[str, str]]:
    for table in shards.tables(["messages"]):
        for messages in table["messages"].to_pylist():
            text = {segment: [] for segment in SEGMENTS}
            standing = [m for m in messages if m["role"] in STANDING_ROLES]
            for message in [m for m in messages if m not in standing] or messages:
                is_response = message["role"] == "assistant"
                text["response" if is_response else "prompt"].append(message["content"])
            yield "\n".join(text["prompt"]), "\n".join(text["response"])


def _parquet(table: pa.Table) -> bytes:
    """Encode a table: floats by byte, latents by difference; both halve what zstd leaves."""
    split = [name for name in table.column_names if name.endswith(_SPLIT)]
    encoding = {f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in split}
    if "latents" in table.column_names:
        encoding["latents.list.element"] = "DELTA_BINARY_PACKED"
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        compression="zstd",
        compression_level=3,
        use_dictionary=False,
        column_encoding=encoding or None,
        row_group_size=_ROW_GROUP_ROWS,
    )
    return sink.getvalue().to_pybytes()
