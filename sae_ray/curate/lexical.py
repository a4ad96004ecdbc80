"""BM25 over the text of a pool: one SQLite FTS5 file, built as the rows stream by.

SQLite ships with Python, ranks with BM25, stems, keeps its memory flat and writes the same bytes
for the same rows. Prompt and response are two columns.
"""

import re
import sqlite3
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float32

from sae_ray.curate.seeds import query_terms
from sae_ray.errors import ArtifactError

_CREATE = (
    "create virtual table pool using fts5(prompt, response, content='', "
    "tokenize='porter unicode61')",
    "create virtual table request using fts5(words, content='', tokenize='porter unicode61')",
)
REQUEST_WORDS = 16
"""Words at either end of a prompt that are searched by themselves: people say what they want before
or after the text that they want it done to."""
Table = Literal["pool", "request"]
_FOUND = np.dtype([("row", np.int64), ("score", np.float64)])


def build(path: str | Path, texts: Iterable[tuple[str, str]]) -> None:
    """Index (prompt, response) texts; the first has row number 0."""
    database = sqlite3.connect(path)
    try:
        for statement in _CREATE:
            database.execute(statement)
        for row, (prompt, response) in enumerate(texts):
            database.execute(
                "insert into pool(rowid, prompt, response) values (?, ?, ?)",
                (row, prompt, response),
            )
            database.execute(
                "insert into request(rowid, words) values (?, ?)", (row, _request(prompt))
            )
        database.commit()
    finally:
        database.close()


def _request(prompt: str) -> str:
    words = prompt.split()
    if len(words) > 2 * REQUEST_WORDS:
        words = [*words[:REQUEST_WORDS], *words[-REQUEST_WORDS:]]
    return " ".join(words)


class LexicalIndex:
    """An FTS5 file, opened for reading."""

    def __init__(self, path: str | Path, num_rows: int) -> None:
        self.path, self.num_rows = Path(path), num_rows
        # A selection may be asked for from several threads of a service; reading is safe.
        self._database = sqlite3.connect(
            f"{self.path.absolute().as_uri()}?mode=ro&immutable=1",
            uri=True,
            check_same_thread=False,
        )

    def scores(
        self, query: str | Mapping[str, float], table: Table = "pool"
    ) -> Float32[np.ndarray, " num_rows"]:
        """Return the BM25 score of every row, 0 where no term occurs; terms may carry weights."""
        weights = dict.fromkeys(query_terms(query), 1.0) if isinstance(query, str) else query
        scores = np.zeros(self.num_rows, dtype=np.float32)
        by_weight: dict[float, list[str]] = {}
        for term, weight in sorted(weights.items()):
            by_weight.setdefault(weight, []).append(re.sub('["\0]', " ", term))
        for weight, terms in by_weight.items():
            match = " OR ".join(f'"{term}"' for term in terms)
            found = np.array(self._found(match, table), dtype=_FOUND)
            scores[found["row"]] += weight * found["score"].astype(np.float32)
        return scores

    def _found(self, match: str, table: Table) -> list[tuple[int, float]]:
        try:
            return self._database.execute(
                f"select rowid, -bm25({table}) from {table} where {table} match ?", (match,)
            ).fetchall()
        except sqlite3.DatabaseError as error:
            raise ArtifactError(
                f"the lexical index {self.path} cannot be read: {error}; delete the index and "
                "make it again"
            ) from error
