"""Repeats as a Ray Data stage: what it finds is what one process does."""

import json
import random
from pathlib import Path

import pytest

from sae_ray.distributed.repeats import find_repeats
from sae_ray.pool import plan


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_on_ray_and_in_process_are_the_same(tmp_path: Path, ray_cluster: None) -> None:
    rng = random.Random(0)
    pieces = [" ".join(rng.choices([f"w{i}" for i in range(99)], k=20)) for _ in range(25)]
    lines = ["{broken"]
    for i in range(80):
        said = " ".join(rng.choices(pieces, k=2))
        turns = [{"role": "user", "content": said}, {"role": "assistant", "content": f"yes {i}"}]
        lines.append(json.dumps({"messages": turns}))
    pool = tmp_path / "pool.jsonl"
    pool.write_text("\n".join(lines) + "\n")
    slices = plan(str(pool), rows_per_shard=16).slices
    for order in ("rows", "content"):
        here = find_repeats(slices, order, plain_text=False, on_ray=False)
        assert find_repeats(slices, order, plain_text=False, on_ray=True) == here
        assert 10 < len(here) < 80
