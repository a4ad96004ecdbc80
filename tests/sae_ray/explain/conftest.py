"""A small pool read by a random model: many copies, and columns with names of their own."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs import index
from sae_ray.config import run_job
from sae_ray.curate.index import FeatureIndex
from tests.conftest import write_pool


@pytest.fixture(scope="session")
def small_index(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_lm_of: Callable[[str], Path],
    make_tiny_sae: Callable[[Path], Path],
) -> FeatureIndex:
    """An index of 80 rows, of which 20 nearly copy an earlier one."""
    folder = tmp_path_factory.mktemp("small")
    rng = random.Random(0)
    rows = [json.loads(line) for line in write_pool(folder / "plain", 60).read_text().splitlines()]
    for number in range(20):
        copied = rng.choice(rows[:60])
        said = [dict(message) for message in copied["messages"]]
        said[-1]["content"] += f" {number}"
        rows.append({"id": f"copy-{number}", "source": "copies", "messages": said})
    for row in rows:
        row["shelf"] = "" if row["source"] == "music" else f"<shelf of {row.pop('source')}>"
    pool = folder / "pool.jsonl"
    pool.write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = f"--pool={pool} --lm={tiny_lm_of('llama')} --sae={make_tiny_sae(folder / 'sae')}"
    line += f" --dtype=float32 --no-check_fit --num_workers=0 --rows_per_shard=16 --out={folder}/i"
    assert run_job(index.main, index.Config, [*line.split(), "--keep_columns=shelf"]) == 0
    return FeatureIndex(f"{folder}/i")
