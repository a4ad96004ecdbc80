"""A selection on disk: the rows with their reasons, and the profile that earned them.

selection.parquet   id, rank, score, n_tokens, messages, reasons (latent, weight, label, tokens)
profile.json        the task as weighted latents, with evidence by channel
rejected.parquet    rows of the pool that could not be read
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sae_ray.artifacts import FileRecord, locate, open_artifact, read_file, write_atomically
from sae_ray.chat import Conversation
from sae_ray.curate.index import FeatureIndex
from sae_ray.curate.scorer import Trace

TOKENS_PER_REASON = 5
PREVIEW_CHARS = 150

_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("rank", pa.int32()),
        ("score", pa.float32()),
        ("n_tokens", pa.int32()),
        ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        (
            "reasons",
            pa.list_(
                pa.struct(
                    [
                        ("latent", pa.int32()),
                        ("weight", pa.float32()),
                        ("label", pa.string()),
                        ("tokens", pa.list_(pa.string())),
                    ]
                )
            ),
        ),
    ]
)


@dataclasses.dataclass(frozen=True)
class Reason:
    """One latent that earned a row its place."""

    latent: int
    weight: float
    """Its share of what the profile's latents add to the row's score."""
    label: str | None
    tokens: list[str]
    """Where it fired most, strongest first; none where the row was not read again."""


@dataclasses.dataclass(frozen=True)
class SelectedRow:
    """One row that was kept, and why."""

    row: int
    score: float
    n_tokens: int
    conversation: Conversation
    reasons: list[Reason]
    trace: Trace
    """Its tokens, with the latents of its reasons in their order."""


def explain_rows(
    index: FeatureIndex,
    rows: Sequence[int],
    scores: Sequence[float],
    contributions: Sequence[Sequence[tuple[int, float]]],
    labels: Mapping[int, str],
    num_traced: int | None = None,
) -> list[SelectedRow]:
    """Join chosen rows with their conversations and the tokens at which their latents fired.

    The model reads the first `num_traced` rows again, or all: the reasons of others name no tokens.
    """
    conversations = index.conversations(rows)
    latents = np.unique([latent for one in contributions for latent, _ in one]).astype(np.int64)
    column = {int(latent): i for i, latent in enumerate(latents)}
    traces = index.scorer.traces(conversations[:num_traced], latents)
    unread = Trace([], np.zeros((0, len(latents)), dtype=np.float32))
    traces += [unread] * (len(rows) - len(traces))
    lengths = index.n_tokens[np.asarray(rows, dtype=np.int64)].sum(1)
    explained = []
    for i, mine in enumerate(contributions):
        own = [column[latent] for latent, _ in mine]
        trace = Trace(traces[i].texts, traces[i].latents[:, own])
        reasons = [
            Reason(latent, weight, labels.get(latent), _strongest(trace, place))
            for place, (latent, weight) in enumerate(mine)
        ]
        explained.append(
            SelectedRow(
                int(rows[i]), float(scores[i]), int(lengths[i]), conversations[i], reasons, trace
            )
        )
    return explained


def write_selection(path: str, rows: Sequence[SelectedRow]) -> FileRecord:
    """Write the table of chosen rows, best first."""
    table = pa.Table.from_pylist(
        [
            {
                "id": one.conversation.id,
                "rank": rank,
                "score": one.score,
                "n_tokens": one.n_tokens,
                "messages": one.conversation.messages,
                "reasons": [dataclasses.asdict(reason) for reason in one.reasons],
            }
            for rank, one in enumerate(rows, start=1)
        ],
        _SCHEMA,
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return write_atomically(f"{path}/selection.parquet", sink.getvalue().to_pybytes())


def write_random(index: FeatureIndex, selection: str, path: str, seed: int = 0) -> str:
    """Write as many random rows of the pool as a selection has, which it must beat; return where.

    Args:
        index: of the pool.
        selection: folder of the selection.
        path: of the JSONL file.
        seed: of the draw.
    """
    fs, root = locate(selection)
    with fs.open(f"{root}/selection.parquet", "rb") as file:
        num_rows = pq.read_metadata(file).num_rows
    drawn = np.random.default_rng(seed).choice(index.num_rows, num_rows, replace=False)
    rows = [dataclasses.asdict(one) for one in index.conversations(np.sort(drawn))]
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
    return path


def preview(path: str, num_rows: int) -> list[str]:
    """Return the warnings of a written selection, and its first rows in two lines each."""
    fs, root = locate(path)
    with fs.open(f"{root}/selection.parquet", "rb") as file:
        rows = pq.read_table(file).slice(0, num_rows).to_pylist()
    lines = [f"   {one}" for one in open_artifact(path, "selection").warnings]
    for row in rows:
        said = " ".join(row["messages"][0]["content"].split())
        reasons = [
            f"{one['label'] or 'latent {}'.format(one['latent'])} ({' '.join(one['tokens'][:2])})"
            for one in row["reasons"][:3]
        ]
        lines.append(f"{row['rank']}. {said[:PREVIEW_CHARS]}\n   because: {'; '.join(reasons)}")
    return lines


def copy_rejected(index: FeatureIndex, path: str) -> FileRecord:
    """Copy the table of rows that could not be read beside the selection."""
    return write_atomically(f"{path}/rejected.parquet", read_file(f"{index.path}/rejected.parquet"))


def _strongest(trace: Trace, column: int) -> list[str]:
    """Return the distinct tokens with the largest activations."""
    activations = trace.latents[:, column]
    order = [i for i in np.argsort(-activations, kind="stable").tolist() if activations[i] > 0]
    return list(dict.fromkeys(trace.texts[i] for i in order))[:TOKENS_PER_REASON]
