"""What tests of routing share: prompts of the embedded pool by domain, read once."""

from collections.abc import Mapping

import numpy as np
import pyarrow.parquet as pq
import pytest

from sae_ray import tiny
from sae_ray.curate.block import IndexBlock
from sae_ray.experts.prototypes import Eyes, requests

NUM_PROMPTS = 60


@pytest.fixture(scope="session")
def eyes() -> Eyes:
    """The embedded model and SAE."""
    return Eyes.open("embedded", "embedded")


@pytest.fixture(scope="session")
def prompts() -> Mapping[str, list[str]]:
    """Last requests of each domain of the embedded pool."""
    found: dict[str, list[str]] = {}
    for row in pq.read_table(tiny.pool_path(), columns=["domain", "messages"]).to_pylist():
        mine = found.setdefault(row["domain"], [])
        if len(mine) < NUM_PROMPTS:
            mine += requests(row["messages"])[-1:]
    return found


@pytest.fixture(scope="session")
def blocks(eyes: Eyes, prompts: Mapping[str, list[str]]) -> Mapping[str, IndexBlock]:
    """The same, as the embedded model sees them."""
    return {domain: eyes.read(texts) for domain, texts in prompts.items()}


@pytest.fixture(scope="session")
def background(blocks: Mapping[str, IndexBlock]) -> IndexBlock:
    """Prompts of domains that have no expert in the tests."""
    names = ("small_talk", "manners", "rewriting", "kinds")
    joined = IndexBlock.concatenate([blocks[one] for one in names])
    return joined.take(np.random.default_rng(0).permutation(len(joined)))
