"""Ray Train over the parts of a training: workers share gradients, checkpoints survive them.

Each worker holds the language model, reads its own shards and computes the gradients of its own
batches; one bucketed all-reduce a step averages them, so that all hold the same SAEs. Every so
many steps each writes what its part depends on. A run goes on from there when a worker died (Ray
starts all of them again), when the driver died (the same settings are started again), and, where
that is allowed, with fewer workers. With `num_workers=0` all of it is in this process, without Ray.
"""

import functools
import logging
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import pyarrow.fs
import ray.train
import ray.train.torch
import torch
import torch.distributed
from fsspec.implementations.local import LocalFileSystem
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError
from ray.util.queue import Empty, Queue
from torch import Tensor

from sae_ray import errors
from sae_ray.artifacts import config_hash, locate, read_file, write_atomically
from sae_ray.distributed.runtime import WORKER_ENV, cluster, plan_workers
from sae_ray.errors import SaeRayError, WorkError
from sae_ray.sae.part import Part, Task, from_bytes, to_bytes
from sae_ray.sae.train import Step

_BUCKET_BYTES = 32 << 20
_CHECKPOINT = ".checkpoint.pt"
_RUNS = ".ray_train"
_START_TIMEOUT_S = 600
"""Ray waits 60 s for workers to start: cold imports on a busy machine take longer."""

logger = logging.getLogger(__name__)

T = TypeVar("T")


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
    """Fit in a thread, while steps come through a queue."""
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(_START_TIMEOUT_S))
    queue = Queue(actor_options={"num_cpus": 0})
    trainer = _trainer(task, _anywhere(path), model_name, queue)
    outcome: list[str] = []
    lost: list[TrainingFailedError] = []

    def fit() -> None:
        try:
            outcome.append(trainer.fit().return_value or "")
        except TrainingFailedError as error:
            lost.append(error)

    thread = threading.Thread(target=fit, daemon=True)
    thread.start()
    while thread.is_alive() or not queue.empty():
        try:
            yield queue.get(timeout=1)
        except Empty:
            continue
    queue.shutdown()
    if lost:
        raise WorkError(
            f"workers were lost more than max_failures={task.settings.max_failures} times, at last "
            f"with: {str(lost[0]).strip().splitlines()[-1]}; see that machines answer and have the "
            "memory, then run the same line again: it goes on from the last checkpoint"
        ) from lost[0]
    if not outcome:
        raise WorkError(f"the run in {path} could not be started: its error is in the log above")
    kind, _, message = outcome[0].partition(": ")
    if kind:
        raise getattr(errors, kind)(message)


def _trainer(task: Task, path: str, model_name: str, queue: Queue) -> TorchTrainer:
    settings = task.settings
    workers = plan_workers(settings.num_workers)
    fs, root = locate(path)
    is_local = isinstance(fs, LocalFileSystem)
    remote = pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fs))
    elastic = (settings.min_workers, workers.count) if settings.min_workers else workers.count
    return TorchTrainer(
        functools.partial(work, task, path, model_name, queue),
        scaling_config=ScalingConfig(
            num_workers=elastic,
            use_gpu=workers.num_gpus > 0,
            resources_per_worker={"CPU": workers.num_cpus, **_gpu(workers.num_gpus)},
        ),
        run_config=RunConfig(
            # Ray goes on with a run of the same name.
            name=config_hash(settings.identity()),
            storage_path=f"{root}/{_RUNS}",
            storage_filesystem=None if is_local else remote,
            failure_config=FailureConfig(max_failures=settings.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            worker_runtime_env={"env_vars": WORKER_ENV},
        ),
    )


def _anywhere(path: str) -> str:
    """Return a path that means the same in the working directory of a worker."""
    fs, root = locate(path)
    return root if isinstance(fs, LocalFileSystem) else path


def _gpu(num: int) -> dict[str, float]:
    return {"GPU": num} if num else {}


def work(task: Task, path: str, model_name: str, queue: Queue) -> str:
    """Do one worker's part; return what is wrong for good, which all workers then agree on.

    An exception would make Ray start all workers again, and the same would come of it.
    """
    context = ray.train.get_context()
    rank, num_workers = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    torch.set_num_threads(1)
    try:
        part = together(
            lambda: Part(task, rank, num_workers, reduce=average, guard=together, device=device)
        )
        _start(part)
        for step in part.steps():
            if rank == 0:
                queue.put(step)
            if _is_due(part):
                _checkpoint(part)
        together(lambda: part.finish(path, model_name))
    except SaeRayError as error:
        return f"{type(error).__name__}: {error}"
    return ""


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


def together(act: Callable[[], T]) -> T:
    """Do something on all workers, or raise on all what went wrong on one: nobody waits for ever.

    Raises:
        SaeRayError: what the first worker that failed raised.
    """
    result, wrong = None, ""
    try:
        result = act()
    except SaeRayError as error:
        wrong = f"{type(error).__name__}: {error}"
    flag = torch.tensor(float(bool(wrong)), device=ray.train.torch.get_device())
    torch.distributed.all_reduce(flag)
    if not flag:
        return result  # pyright: ignore[reportReturnType]
    said: list[str] = [""] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(said, wrong)
    kind, _, message = next(one for one in said if one).partition(": ")
    raise getattr(errors, kind)(message)
