"""A gang: Ray Train workers that run one loop together, and what they tell on the way.

    for step in run_gang(loop, config, Gang(workers, folder, name)):
        ...

The loop is called as `loop(config, tell)` on every worker, in a process group that is there. It
takes up `ray.train.get_checkpoint()` where there is one and reports checkpoints from all ranks.
A worker that dies takes the gang down; Ray starts it again from the last checkpoint. So does the
same call after the driver died: a run is known by its folder and name, and nothing else.
"""

import contextlib
import dataclasses
import os
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from functools import partial
from queue import Queue
from typing import Any, TypeVar

import ray
import ray.train.torch
import torch
import torch.distributed
from fsspec.implementations.local import LocalFileSystem
from joblib import cpu_count
from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray.exceptions import RayError
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.config import LoggingConfig
from ray.train.v2.api.exceptions import TrainingFailedError
from ray.util.queue import Queue as RayQueue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from sae_ray import errors
from sae_ray.artifacts import locate
from sae_ray.distributed.runtime import WORKER_ENV, Workers
from sae_ray.errors import SaeRayError, WorkError
from sae_ray.storage import is_refusal, storage_errors, told

T = TypeVar("T")
Tell = Callable[[Any], None]
"""Hands a message of a worker to whoever iterates over the gang."""
Loop = Callable[[dict[str, Any], Tell], Any]

_DRIVER_ENV = {
    # Cold imports of torch and DeepSpeed on a busy machine take longer than Ray's minute.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600",
    # A checkpoint counts once the controller has seen it: every 2 s unless told otherwise.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # Workers would each start in a folder of their own, where relative paths name something else.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}
_COLLECTIVES_TIMEOUT_S = 1800
_ENDS_WITHIN_S = 20.0
_POLL_S = 0.2


@dataclasses.dataclass(frozen=True)
class Gang:
    """How many workers, where their run lies, and how much it forgives."""

    workers: Workers
    folder: str
    """Storage that every node reaches: any fsspec path."""
    name: str
    """A folder and a name are one run: another configuration needs another of either."""
    max_failures: int = 3
    """Times that the gang is started again after a worker died."""
    min_workers: int | None = None
    """Start again with as few as these where the others are gone; all of them unless given."""
    checkpoints_kept: int = 2


@dataclasses.dataclass(frozen=True)
class _Failed:
    """What a person can put right, on its way from a worker to the driver."""

    kind: str
    message: str

    def error(self) -> SaeRayError:
        return getattr(errors, self.kind)(self.message)


def run_gang(loop: Loop, config: Mapping[str, Any], gang: Gang) -> Generator[Any, None, Any]:
    """Run a loop on all workers; yield what they tell, and return what rank 0 returned.

    Raises:
        SaeRayError: as a worker raised it.
        WorkError: the workers died more often than `max_failures`.
    """
    # Ray's own queue: an actor that needs no CPU and lives as long as this call; here, since with
    # another node it would be lost.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    mailbox = RayQueue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
    ended: Queue[Any] = Queue()
    with environment(_DRIVER_ENV):
        trainer = _trainer(partial(_work, loop, mailbox), dict(config), gang)
        thread = threading.Thread(target=_fit, args=(trainer, ended), daemon=True)
        thread.start()
        try:
            told = yield from _messages(mailbox, thread)
        finally:
            mailbox.shutdown(force=True)
    if told is not None:
        raise told.error()
    if ended.empty():  # the thread ended with an error of another kind, which it has printed
        raise WorkError(f"the run in {gang.folder} could not be started: see its error above")
    outcome = ended.get()
    if isinstance(outcome, _Failed):
        raise outcome.error()
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome


def _messages(mailbox: RayQueue, thread: threading.Thread) -> Generator[Any, None, _Failed | None]:
    """Yield messages until the workers are done; return an error if one of them told it."""
    failed: _Failed | None = None
    running = True
    while running:
        running = thread.is_alive()
        for message in mailbox.get_nowait_batch(mailbox.qsize()):
            if isinstance(message, _Failed):
                failed = message
            else:
                yield message
        if failed is not None:
            # Workers that all found it end by themselves; of one alone the others would wait.
            thread.join(_ENDS_WITHIN_S)
            return failed
        thread.join(_POLL_S)
    return None


def _work(loop: Loop, mailbox: RayQueue, config: dict[str, Any]) -> Any:
    try:
        return loop(config, mailbox.put)
    except SaeRayError as error:
        # Told, not raised: Ray would start the gang again, to fail in the same way.
        failed = _Failed(type(error).__name__, str(error))
    except storage_errors() as error:
        if not is_refusal(error):
            raise
        place = str(getattr(error, "filename", None) or "storage")
        failed = _Failed("ArtifactError", told(place, error))
    mailbox.put(failed)
    return failed


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


def _fit(trainer: TorchTrainer, ended: "Queue[Any]") -> None:
    try:
        ended.put(trainer.fit().return_value)
    except (TrainingFailedError, RayError) as error:
        lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
        said = lines[-1] if lines else type(error).__name__
        ended.put(
            WorkError(
                f"the workers failed for good ({said}): see Ray's log of them, put it right, then "
                "run the same line again; it goes on from the last checkpoint"
            )
        )


def _trainer(work: Callable[[dict[str, Any]], Any], config: dict, gang: Gang) -> TorchTrainer:
    workers = gang.workers
    fs, root = locate(gang.folder)
    remote = None if isinstance(fs, LocalFileSystem) else PyFileSystem(FSSpecHandler(fs))
    return TorchTrainer(
        work,
        train_loop_config=config,
        torch_config=TorchConfig(
            backend="nccl" if workers.num_gpus else "gloo", timeout_s=_COLLECTIVES_TIMEOUT_S
        ),
        scaling_config=ScalingConfig(
            num_workers=(gang.min_workers, workers.count) if gang.min_workers else workers.count,
            use_gpu=bool(workers.num_gpus),
            resources_per_worker={"CPU": workers.num_cpus}
            | ({"GPU": workers.num_gpus} if workers.num_gpus else {}),
        ),
        run_config=RunConfig(
            name=gang.name,
            storage_path=root,
            storage_filesystem=remote,
            failure_config=FailureConfig(max_failures=gang.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=gang.checkpoints_kept),
            worker_runtime_env={"env_vars": _worker_env(workers)},
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )


def _worker_env(workers: Workers) -> dict[str, str]:
    """Return what must be set before a worker imports torch or DeepSpeed."""
    alone = not workers.num_gpus and len(ray.nodes()) == 1
    # Fewer workers than this machine has cores share out all of them.
    threads = max(workers.num_cpus, cpu_count() // workers.count if alone else 0)
    here = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    here["MALLOC_ARENA_MAX"] = "1"  # loops run in threads: see sae_ray.memory
    # DeepSpeed looks for a GPU's toolkit unless it is told that there is none.
    return WORKER_ENV | here | ({} if workers.num_gpus else {"DS_ACCELERATOR": "cpu"})


@contextlib.contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set what Ray reads from the driver's environment, where the user did not."""
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
