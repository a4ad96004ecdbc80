"""Parts of a training: resumed to the bit, divided by data or by SAEs, empty shards dealt with."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from sae_ray.errors import ConfigError, PoolError
from sae_ray.lm import HookPoint, load_config
from sae_ray.pool import plan
from sae_ray.sae.part import FOUND, Part, Task, from_bytes, share_out, to_bytes
from sae_ray.sae.recipe import SAESpec
from sae_ray.sae.settings import TrainSettings

pytestmark = [
    pytest.mark.slow,  # sae-lens takes 8 s to import
    pytest.mark.filterwarnings("ignore:The 'utils' module has been deprecated:DeprecationWarning"),
]

POINT = HookPoint.parse("blocks.1.hook_resid_post")


@pytest.fixture
def task(tiny_lm: Path, tiny_pool: Path) -> Task:
    settings = TrainSettings(
        lm=str(tiny_lm),
        data=str(tiny_pool),
        hook_points=[str(POINT)],
        archs=["topk", "jumprelu"],
        widths=[48],
        k=4,
        num_tokens=1280,
        batch_tokens=64,
        buffer_batches=4,
        rows_per_shard=8,
    )
    config = load_config(tiny_lm)
    return Task(
        settings,
        str(tiny_lm),
        tuple(settings.specs(config, "m")),
        settings.recipe(),
        settings.arrangement(config),
        plan(str(tiny_pool), rows_per_shard=8).slices,
    )


def weights(part: Part) -> list[torch.Tensor]:
    return [p for one in part.trainer.learners.values() for p in one.sae.state_dict().values()]


def test_a_part_that_was_stopped_ends_at_the_same_weights(task: Task, tmp_path: Path) -> None:
    whole = Part(task)
    whole.start()
    content = b""
    for step in whole.steps():
        if step.number == 6:
            content = to_bytes(whole.state())
    again = Part(task)
    state = from_bytes(content)
    again.load(state, state)
    assert [step.number for step in again.steps()] == list(range(7, 20))
    for mine, theirs in zip(weights(whole), weights(again), strict=True):
        assert torch.equal(mine, theirs)
    assert [c["number"] for c in again.curves] == [c["number"] for c in whole.curves]
    assert whole.curves[-1]["num_tokens"] == 1280
    out = tmp_path / "out"
    again.finish(str(out), "m")
    found = json.loads((out / FOUND / "0.json").read_text())
    assert found["counts"]["tokens"] >= 1280
    assert {path.name for path in out.iterdir()} == {FOUND, *(spec.name for spec in task.specs)}


def test_another_number_of_workers_keeps_the_saes_and_begins_the_data_anew(
    task: Task, caplog: pytest.LogCaptureFixture
) -> None:
    one = Part(task)
    one.start()
    steps = one.steps()
    for _ in range(3):
        next(steps)
    state = from_bytes(to_bytes(one.state()))
    first = [value.clone() for value in weights(one)]
    two = Part(task, rank=1, num_workers=2)
    two.load(None, state)
    assert "the data begins anew at step 3" in caplog.text
    assert two.trainer.number == 3
    assert all(torch.equal(a, b) for a, b in zip(first, weights(two), strict=True))
    assert two.stream.cursor.num_passes == 0


def test_workers_divide_the_shards_and_one_without_any_reads_the_others(task: Task) -> None:
    rows = [
        {shard.args[0].index for shard in Part(task, rank, 3).stream.shards}  # pyright: ignore
        for rank in range(3)
    ]
    assert not rows[0] & rows[1]
    assert set.union(*rows) == {part.index for part in task.slices}
    few = dataclasses.replace(task, slices=task.slices[:1])
    idle = Part(few, 1, 2)
    assert len(idle.stream.shards) == 1
    idle.start()
    assert next(idle.steps()).number == 0
    empty = dataclasses.replace(task, repeats=frozenset(range(60)))
    with pytest.raises(PoolError, match="holds a token"):
        Part(empty)


def test_saes_are_placed_by_cost_and_train_as_they_would_together(task: Task) -> None:
    wide = [SAESpec(POINT, "topk", width, k=4) for width in (64, 48, 32, 16)]
    shares = share_out(wide, 2)
    assert [sorted(one.d_sae for one in share) for share in shares] == [[16, 64], [32, 48]]
    with pytest.raises(ConfigError, match="4 SAEs cannot be placed on num_workers=5"):
        share_out(wide, 5)
    together = Part(task)
    together.start()
    list(together.steps())
    settings = task.settings.model_copy(update={"placement": "saes", "num_workers": 2})
    placed = dataclasses.replace(task, settings=settings)
    for rank in range(2):
        part = Part(placed, rank, 2)
        part.start()
        list(part.steps())
        ((name, learner),) = part.trainer.learners.items()
        theirs = together.trainer.learners[name].sae.state_dict()
        assert all(torch.equal(v, theirs[key]) for key, v in learner.sae.state_dict().items())
