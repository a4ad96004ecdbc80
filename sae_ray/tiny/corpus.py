"""What the tiny model reads: generated rows, and real text and rows whose licence permits it."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from sae_ray.tiny.split import is_held_out

PERMITTED = ("MIT", "ODC-By", "CC BY 4.0")
"""Licences of pool rows that let a model trained on them be shipped."""

PUBLIC_DOMAIN = ("nltk/inaugural", "nltk/state_union", "nltk/genesis")
"""Speeches of a government and old or freely given Bible translations."""

_COMMON = frozenset(["the", "and", "of", "to", "in", "that"])


@dataclasses.dataclass(frozen=True, slots=True)
class Corpus:
    """Documents by form: chats are lists of turns, pages are plain text."""

    chats: list[list[dict[str, str]]]
    pages: list[str]
    held_out_chats: list[list[dict[str, str]]]


def real_corpus(pool_path: Path | None, text_path: Path | None) -> Corpus:
    """Read the permitted part of a real pool and of real text; a missing path adds nothing."""
    chats: list[list[dict[str, str]]] = []
    held_out: list[list[dict[str, str]]] = []
    rows = _rows(pool_path, ("id", "licence", "messages")) if pool_path else ()
    for row in rows:
        if row["licence"] in PERMITTED:
            (held_out if is_held_out(row["id"]) else chats).append(row["messages"])
    return Corpus(chats, [page["text"] for page in public_pages(text_path)], held_out)


def public_pages(text_path: Path | None) -> list[dict[str, str]]:
    """Return the pages of real text that are in the public domain and in English."""
    rows = _rows(text_path, ("source", "licence", "text")) if text_path else ()
    return [dict(r) for r in rows if r["source"] in PUBLIC_DOMAIN and _is_english(r["text"])]


def _rows(path: Path, columns: tuple[str, ...]) -> Iterable[Mapping[str, Any]]:
    return pq.read_table(path, columns=list(columns)).to_pylist()


def _is_english(text: str) -> bool:
    words = text.lower().split()
    return sum(word in _COMMON for word in words) > 0.1 * len(words)
