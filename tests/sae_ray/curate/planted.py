"""A planted pool: rows of known tasks in an index that was never read by a model."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Float32, Int64

from sae_ray.artifacts import begin, write_atomically
from sae_ray.curate.block import IndexBlock
from sae_ray.curate.build import finish_index
from sae_ray.curate.index import KIND, FeatureIndex, shard_name

NUM_ROWS, D_SAE, D_IN = 1200, 64, 12
TASKS = ("baking", "sailing", "chess")
SHARE = 0.1
"""Share of the pool's rows that each task has."""
PARENTS = {task: 3 * i for i, task in enumerate(TASKS)}
"""Each task has a parent latent, the child that absorbs it in some rows, and a helper."""
WORDS = {
    "baking": "bake bread oven dough flour",
    "sailing": "sail boat harbour mast wind",
    "chess": "chess bishop castle opening pawn",
}
FILLER = [f"word{i}" for i in range(400)]


@dataclasses.dataclass(frozen=True)
class Planted:
    """An index, and what is true of it."""

    index: FeatureIndex
    task: Int64[np.ndarray, " num_rows"]
    """Number of each row's task, -1 for none."""
    decoder: Float32[np.ndarray, "d_sae d_in"]

    def relevant(self, task: str) -> Bool[np.ndarray, " num_rows"]:
        """Return which rows a task has."""
        return self.task == TASKS.index(task)

    def recall(self, task: str, scores: Float32[np.ndarray, " num_rows"]) -> float:
        """Return recall at as many rows as the task has."""
        relevant = self.relevant(task)
        best = np.argsort(-scores, kind="stable")[: relevant.sum()]
        return float(relevant[best].mean())


def plant(
    path: Path,
    *,
    absorbed: float = 0.0,
    seed: int = 0,
    named: float = 0.3,
    copied: float = 0.0,
) -> Planted:
    """Write an index in which the tasks' latents, directions and (in some rows) words are known.

    Of the rows, the share `copied` says what an earlier row says, but for one word or for none.
    """
    rng = np.random.default_rng(seed)
    task = np.where(rng.random(NUM_ROWS) < SHARE * len(TASKS), rng.integers(3, size=NUM_ROWS), -1)
    n_tokens = np.stack([rng.integers(4, 200, NUM_ROWS), rng.integers(0, 60, NUM_ROWS)], axis=1)
    means = _latents(rng, task, n_tokens.sum(1), absorbed)
    directions = rng.normal(size=(len(TASKS), D_IN))
    hidden = rng.normal(size=(NUM_ROWS, D_IN)) + np.where(task[:, None] >= 0, directions[task], 0)
    texts = [_text(rng, TASKS[one] if one >= 0 and rng.random() < named else None) for one in task]
    for row in np.flatnonzero(rng.random(NUM_ROWS) < copied)[1:]:
        question, answer = texts[rng.integers(row)]
        texts[row] = (question, answer if rng.random() < 0.5 else f"{answer} {row}")
    decoder = rng.normal(size=(D_SAE, D_IN)).astype(np.float32)
    for parent in PARENTS.values():
        decoder[parent + 1] = decoder[parent] + 0.3 * rng.normal(size=D_IN)
    _write(path, means.astype(np.float32), hidden.astype(np.float32), n_tokens, texts)
    return Planted(FeatureIndex(str(path)), task, decoder)


def _latents(
    rng: np.random.Generator, task: np.ndarray, lengths: np.ndarray, absorbed: float
) -> np.ndarray:
    # Longer rows have more latents on, as real rows do; a task's latents are on in some others too.
    chance = 0.2 + 0.4 * lengths / lengths.max()
    on = rng.random((NUM_ROWS, D_SAE)) < chance[:, None]
    means = np.where(on, rng.exponential(0.3, (NUM_ROWS, D_SAE)), 0)
    for number, parent in enumerate(PARENTS.values()):
        mine = np.flatnonzero(task == number)
        means[:, parent : parent + 3] *= 0.5
        in_child = rng.random(len(mine)) < absorbed
        means[mine, parent] = np.where(in_child, 0, 1 + rng.random(len(mine)))
        means[mine[in_child], parent + 1] = 1 + rng.random(in_child.sum())
        on = rng.random(len(mine)) < 0.8
        means[mine, parent + 2] = np.where(on, 1 + rng.random(len(mine)), 0)
    return means


def _text(rng: np.random.Generator, task: str | None) -> tuple[str, str]:
    words = rng.choice(FILLER, 20).tolist()
    if task is not None:
        words += rng.choice(WORDS[task].split(), 3, replace=False).tolist()
    return " ".join(words), " ".join(rng.choice(FILLER, 5))


def _write(
    path: Path,
    means: np.ndarray,
    hidden: np.ndarray,
    n_tokens: np.ndarray,
    texts: list[tuple[str, str]],
) -> None:
    begin(str(path), KIND, {"keep_columns": []})
    size = NUM_ROWS // 4
    for shard in range(4):
        rows = np.arange(shard * size, (shard + 1) * size)
        table = _block(rows, means, hidden, n_tokens).to_table()
        messages = [
            [
                {"role": role, "content": text}
                for role, text in zip(("user", "assistant"), texts[row], strict=True)
            ]
            for row in rows
        ]
        sink = pa.BufferOutputStream()
        pq.write_table(table.append_column("messages", pa.array(messages)), sink)
        record = write_atomically(f"{path}/{shard_name(shard)}", sink.getvalue().to_pybytes())
        part = {
            "shard": shard,
            "record": record.model_dump(),
            "num_rows": size,
            "num_tokens": int(n_tokens[rows].sum()),
            "template_latents": [D_SAE - 1],
            "template_counts": [10**6],
            "rejected": [],
        }
        write_atomically(f"{path}/.parts/{shard:05d}.json", json.dumps(part).encode())
    finish_index(str(path), 4, d_sae=D_SAE, max_rejected=0.1)


def _block(
    rows: np.ndarray, means: np.ndarray, hidden: np.ndarray, n_tokens: np.ndarray
) -> IndexBlock:
    here = means[rows] > 0
    where, latents = np.nonzero(here)
    both = np.stack([means[rows][where, latents]] * 2, axis=1).astype(np.float32)
    lengths = n_tokens[rows].astype(np.int32)
    return IndexBlock(
        rows=rows.astype(np.int64),
        ids=[f"row-{row}" for row in rows],
        n_tokens=lengths,
        truncated=np.zeros(len(rows), dtype=bool),
        hidden=np.stack([hidden[rows]] * 2, axis=1),
        l1=np.stack([means[rows].sum(1)] * 2, axis=1).astype(np.float32),
        indptr=np.concatenate([[0], np.cumsum(here.sum(1))]).astype(np.int64),
        latents=latents.astype(np.int32),
        means=both,
        maxes=2 * both,
        counts=np.ones_like(both, dtype=np.int32),
        d_sae=D_SAE,
    )
