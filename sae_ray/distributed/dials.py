"""Ray actors that hold a tuned model: batches of rows out, what each comes to back, in order."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError
from ray.util import ActorPool

from sae_ray import errors
from sae_ray.distributed.runtime import WORKER_ENV, cluster, plan_workers, require_shared
from sae_ray.errors import ConfigError, SaeRayError, WorkError
from sae_ray.explain.dial import Dial, Piece, Spread
from sae_ray.explain.tuned import Tuned
from sae_ray.threads import use_cores


class DialWorker:
    """A worker: a tuned model loaded once, with the first of the batches that come to it.

    What is wrong for good comes back as an answer, as `ShardWriter` in `data.py` says why.
    """

    def __init__(self, tuned: Tuned, num_threads: int) -> None:
        use_cores(num_threads)
        self.tuned = tuned
        self.dial: Dial | None = None

    def answer(self, piece: Piece) -> np.ndarray | tuple[str, str]:
        """Return what a batch comes to, or name and message of an error."""
        try:
            self.dial = self.dial or self.tuned.dial()
            return self.dial.answer(piece)
        except SaeRayError as error:
            return type(error).__name__, str(error)


@contextlib.contextmanager
def dials_over(tuned: Tuned, num_workers: int) -> Iterator[Spread]:
    """Let workers load a tuned model, and answer for it until the context ends.

    What is asked is the same however many they are, and so is what it comes to.

    Raises:
        ConfigError: there is no room for so many, or a machine does not see the model.
    """
    with cluster():
        require_shared([tuned.lm, *tuned.saes])
        workers = plan_workers(num_workers)
        unit, each = ("GPU", workers.num_gpus) if workers.num_gpus else ("CPU", workers.num_cpus)
        room = int(ray.cluster_resources().get(unit, 0)) // each
        if num_workers > room:  # those beyond would be waited for, for ever
            raise ConfigError(
                f"{num_workers} workers are asked for and the cluster has {unit}s for {room}: give "
                f"--num_workers {room} or fewer"
            )
        kind = ray.remote(
            num_cpus=workers.num_cpus,
            num_gpus=workers.num_gpus,
            max_restarts=1,
            max_task_retries=1,
            runtime_env={"env_vars": WORKER_ENV},
        )(DialWorker)
        held = ray.put(tuned)
        actors: list[Any] = [kind.remote(held, workers.num_cpus) for _ in range(num_workers)]
        pool = ActorPool(actors)
        try:
            yield lambda pieces: _answers(pool, pieces)
        finally:
            for actor in actors:
                ray.kill(actor)


def _answers(pool: ActorPool, pieces: Sequence[Piece]) -> list[np.ndarray]:
    try:
        found: list[Any] = list(
            pool.map(lambda actor, piece: actor.answer.remote(piece), list(pieces))
        )
    except RayError as error:
        raise WorkError(
            f"the cluster failed while latents were turned off and on: "
            f"{str(error).strip().splitlines()[-1]}; see that its machines answer and reach the "
            "model, then run the same line again"
        ) from error
    for one in found:
        if isinstance(one, tuple):
            name, message = one
            raise getattr(errors, name)(message)
    return found
