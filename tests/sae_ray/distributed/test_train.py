"""Ray Train: gradients of two workers, a worker lost, a driver lost, and what is wrong for good."""

import dataclasses
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed
from safetensors.torch import load_file

from sae_ray.distributed.train import average, train_parts
from sae_ray.errors import PoolError
from sae_ray.lm import HookPoint, load_config
from sae_ray.pool import plan
from sae_ray.sae.buffer import TokenBatch
from sae_ray.sae.part import Task
from sae_ray.sae.recipe import Recipe, SAESpec
from sae_ray.sae.settings import TrainSettings
from sae_ray.sae.train import Trainer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore:The 'utils' module has been deprecated:DeprecationWarning"),
]

POINT = HookPoint.parse("blocks.1.hook_resid_post")
SPECS = [
    SAESpec(POINT, "standard", 48, sparsity=0.3),
    SAESpec(POINT, "gated", 48, sparsity=0.3),
    SAESpec(POINT, "jumprelu", 48, k=4),
    SAESpec(POINT, "topk", 48, k=4),
]


def batch(rows: slice) -> TokenBatch:
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
    return TokenBatch(torch.zeros(64, 4, dtype=torch.int32)[rows], {POINT: x[rows]})


def gradients(rows: slice, reduce: Callable | None) -> list[torch.Tensor]:
    """Return what workers share after a batch: gradients, figures, what fired; in fp64."""
    trainer = Trainer(SPECS, Recipe(10, batch_tokens=64), {POINT: 16})
    shared: list[torch.Tensor] = []
    for learner in trainer.learners.values():
        learner.sae.double()
        learner.sae.dtype = torch.float64
        tally = learner.gradients(batch(rows).activations[POINT], 5)
        # The variance of a batch is about that batch's own mean.
        tally.figures[2] = 0
        shared += learner.shared(tally)
    if reduce:
        reduce(shared)
    return shared


def _worker(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    found = gradients(slice(32 * rank, 32 * rank + 32), average)
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_workers_have_the_gradients_of_one_with_twice_the_batch(tmp_path: Path) -> None:
    whole = gradients(slice(0, 64), None)
    port = 20_000 + os.getpid() % 20_000
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_worker, args=(r, port, str(tmp_path))) for r in range(2)]
    for process in workers:
        process.start()
    for process in workers:
        process.join()
        assert process.exitcode == 0
    for rank in range(2):
        shared = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for mine, theirs in zip(shared, whole, strict=True):
            # The threshold of JumpReLU stays in fp32, whatever the rest is in.
            tolerance = 1e-9 if theirs.dtype == torch.float64 else 1e-5
            error = (mine - theirs).abs().max()
            assert error <= tolerance * max(1, theirs.abs().max()), (mine.dtype, mine.shape)
    halves = [gradients(slice(begin, begin + 32), None) for begin in (0, 32)]
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(*halves, strict=True))


@pytest.fixture
def task(tiny_lm: Path, tmp_path: Path, make_pool: Callable[[Path, int], Path]) -> Task:
    pool = make_pool(tmp_path / "pool.jsonl", 120)
    settings = TrainSettings(
        lm=str(tiny_lm),
        data=str(pool),
        hook_points=[str(POINT)],
        archs=["topk"],
        widths=[48],
        k=4,
        num_tokens=2 * 64 * 400,
        batch_tokens=64,
        buffer_batches=4,
        rows_per_shard=8,
        num_workers=2,
        checkpoint_every=100,
    )
    config = load_config(tiny_lm)
    return Task(
        settings,
        str(tiny_lm),
        tuple(settings.specs(config, "m")),
        settings.recipe(),
        settings.arrangement(config),
        plan(str(pool), rows_per_shard=8).slices,
    )


def run(task: Task, path: Path) -> list[int]:
    return [step.number for step in train_parts(task, str(path), "m")]


def weights(task: Task, path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / task.specs[0].name / "sae_weights.safetensors")


def train_workers() -> Iterator[psutil.Process]:
    for process in psutil.process_iter(["cmdline"]):
        if any("RayTrainWorker" in word for word in process.info["cmdline"] or ()):
            yield process


@pytest.mark.soak
def test_a_lost_worker_is_survived_and_the_weights_are_those_of_an_unbroken_run(
    task: Task, tmp_path: Path, ray_cluster: None
) -> None:
    assert run(task, tmp_path / "whole") == list(range(400))
    killed = threading.Event()

    def kill_one() -> None:
        while not list((tmp_path / "broken").rglob("worker-1.pt")):
            time.sleep(0.05)
        time.sleep(3)  # Ray takes a checkpoint in every two seconds
        for process in list(train_workers())[:1]:
            process.kill()
            killed.set()

    slow = dataclasses.replace(
        task, settings=task.settings.model_copy(update={"checkpoint_every": 20})
    )
    threading.Thread(target=kill_one, daemon=True).start()
    steps = run(slow, tmp_path / "broken")
    assert killed.is_set(), "the run ended before a worker could be killed"
    assert steps[-1] == 399
    assert len(steps) > len(set(steps)), "nothing was repeated: no checkpoint was taken up"
    whole, broken = weights(task, tmp_path / "whole"), weights(task, tmp_path / "broken")
    assert all(torch.equal(whole[name], broken[name]) for name in whole)


@pytest.mark.soak
def test_what_is_wrong_on_one_worker_ends_all_at_once(
    task: Task, tmp_path: Path, ray_cluster: None
) -> None:
    pool = Path(task.slices[0].path)
    lines = pool.read_text().splitlines()
    # Rows of every other shard, which the second worker reads.
    broken = [line if i // 8 % 2 == 0 else "{" for i, line in enumerate(lines * 4)]
    pool.write_text("\n".join(broken) + "\n")
    bad = dataclasses.replace(task, slices=plan(str(pool), rows_per_shard=8).slices)
    with pytest.raises(PoolError, match="cannot be read .*not valid JSON"):
        run(bad, tmp_path / "out")
