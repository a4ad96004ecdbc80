"""Ray Train over the parts of a training: workers share gradients, checkpoints survive them.

Each worker holds the language model, reads its own shards and computes the gradients of its own
batches; one bucketed all-reduce a step averages them, so that all hold the same SAEs. Every so
many steps each writes what its part depends on. A run goes on from there when a worker died (Ray
starts all of them again), when the driver died (the same settings are started again), and, where
that is allowed, with fewer workers. With `num_workers=0` all of it is in this process, without Ray.
"""

import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
import torch.distributed
from fsspec.implementations.local import LocalFileSystem
from ray.train import Checkpoint
from torch import Tensor

from sae_ray.artifacts import config_hash, locate, read_file, write_atomically
from sae_ray.distributed.gang import Gang, Tell, run_gang, together
from sae_ray.distributed.runtime import cluster, plan_workers
from sae_ray.memory import keep_large_blocks
from sae_ray.sae.part import Part, Task, from_bytes, to_bytes
from sae_ray.sae.train import Step

_BUCKET_BYTES = 32 << 20
_CHECKPOINT = ".checkpoint.pt"
_RUNS = ".ray_train"


def train_parts(task: Task, path: str, model_name: str) -> Iterator[Step]:
    """Train to the end, yielding steps; what each part has made and found then lies in `path`.

    Raises:
        TrainingError: a loss was no number or blew up.
        PoolError: the data cannot be read.
        WorkError: workers were lost more often than allowed.
    """
    if task.settings.num_workers == 0:
        yield from _in_process(task, path, model_name)
    else:
        with cluster():
            yield from _on_ray(task, path, model_name)


def _in_process(task: Task, path: str, model_name: str) -> Iterator[Step]:
    keep_large_blocks()
    part = Part(task, device="cuda" if torch.cuda.is_available() else "cpu")
    try:
        state = from_bytes(read_file(f"{path}/{_CHECKPOINT}"))
        part.load(state, state)
    except FileNotFoundError:
        part.start()
    for step in part.steps():
        if _is_due(part):
            write_atomically(f"{path}/{_CHECKPOINT}", to_bytes(part.state()))
        yield step
    part.finish(path, model_name)


def _is_due(part: Part) -> bool:
    return part.trainer.number % part.task.settings.checkpoint_every == 0 or part.is_finished


def _on_ray(task: Task, path: str, model_name: str) -> Iterator[Step]:
    settings = task.settings
    gang = Gang(
        plan_workers(settings.num_workers),
        f"{_anywhere(path)}/{_RUNS}",
        config_hash(settings.identity()),  # Ray goes on with a run of the same name
        max_failures=settings.max_failures,
        min_workers=settings.min_workers,
    )
    config = {"task": task, "path": _anywhere(path), "model_name": model_name}
    steps = run_gang(_loop, config, gang)
    yield from steps if settings.placement == "data" else _joined(steps, len(task.specs))


def _joined(steps: Iterator[Step], num_saes: int) -> Iterator[Step]:
    """Put the steps of workers with SAEs of their own together, in order."""
    waiting: dict[int, Step] = {}
    for step in steps:
        there = waiting.get(step.number, step)
        whole = dataclasses.replace(there, saes={**there.saes, **step.saes})
        waiting[step.number] = whole
        if len(whole.saes) == num_saes:
            yield waiting.pop(step.number)


def _anywhere(path: str) -> str:
    """Return a path that means the same in the working directory of a worker."""
    fs, root = locate(path)
    return root if isinstance(fs, LocalFileSystem) else path


def _loop(config: dict[str, Any], tell: Tell) -> None:
    """Do one worker's part; what is wrong for good is raised on all workers."""
    keep_large_blocks()
    task: Task = config["task"]
    context = ray.train.get_context()
    rank, num_workers = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    part = together(
        lambda: Part(task, rank, num_workers, reduce=average, guard=together, device=device)
    )
    _start(part)
    for step in part.steps():
        if rank == 0 or not part.owns_all:
            tell(step)
        if _is_due(part):
            _checkpoint(part)
    together(lambda: part.finish(config["path"], config["model_name"]))


def _start(part: Part) -> None:
    """Go on from the last checkpoint, if there is one."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        part.start()
        return
    with checkpoint.as_directory() as folder:
        mine, first = (Path(folder) / f"worker-{rank}.pt" for rank in (part.rank, 0))
        own = from_bytes(mine.read_bytes()) if mine.exists() else None
        part.load(own, from_bytes(first.read_bytes()) if part.rank or own is None else own)


def _checkpoint(part: Part) -> None:
    with tempfile.TemporaryDirectory(prefix="sae-ray-") as folder:
        (Path(folder) / f"worker-{part.rank}.pt").write_bytes(to_bytes(part.state()))
        metrics = {"step": part.trainer.number}
        ray.train.report(metrics, Checkpoint.from_directory(folder))


def average(tensors: Sequence[Tensor]) -> None:
    """Average each tensor over all workers, in place, in few large messages."""
    bucket: list[Tensor] = []
    room = 0
    for tensor in sorted(tensors, key=lambda one: str(one.dtype)):
        num_bytes = tensor.numel() * tensor.element_size()
        if bucket and (bucket[0].dtype != tensor.dtype or num_bytes > room):
            _average_bucket(bucket)
            bucket = []
        if not bucket:
            room = _BUCKET_BYTES
        bucket.append(tensor)
        room -= num_bytes
    if bucket:
        _average_bucket(bucket)


def _average_bucket(tensors: Sequence[Tensor]) -> None:
    flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
    torch.distributed.all_reduce(flat)
    flat /= torch.distributed.get_world_size()
    for tensor, part in zip(tensors, flat.split([one.numel() for one in tensors]), strict=True):
        tensor.detach().copy_(part.view_as(tensor))
