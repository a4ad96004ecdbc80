"""A router over the embedded model, fitted to two domains of its pool; most others are nobody's."""

import pyarrow.parquet as pq

from sae_ray import tiny
from sae_ray.experts.prototypes import Eyes, requests
from sae_ray.experts.router import Router
from sae_ray.sae.labels import read_labels

SORT = "Line these up, lowest in front: 4, 2, 9"
"""Is one of them's."""
NOBODYS = "Hello, who are you and what is your name?"
KNOWN = {"order": "id-order", "velan": "id-velan"}
"""Ids by name."""


def make_router(folder: str) -> Router:
    """Fit it and save it."""
    eyes, prompts = Eyes.open("embedded", "embedded"), dict[str, list[str]]()
    for row in pq.read_table(tiny.pool_path(), columns=["domain", "messages"]).to_pylist():
        prompts.setdefault(row["domain"], []).extend(requests(row["messages"])[-1:])
    known = {
        id: (name, f"About <i>{name}</i>", eyes.read(prompts[name][:40]))
        for name, id in KNOWN.items()
    }
    others = [text for name in prompts if name not in KNOWN for text in prompts[name][:30]]
    labels = read_labels(tiny.labels_path(), tiny.sae_path())
    router = Router.fit(eyes, known, eyes.read(others), labels=labels)
    router.save(folder, "embedded", "embedded")
    return router
