"""Part: what one worker does of a training, its state, and the curves that it draws.

    part = Part(task, rank, num_workers, reduce=all_reduce)
    part.start()                   or part.load(own state, state of the first worker)
    for step in part.steps(): ...

Workers divide the shards of the data and hold the same SAEs; or, where those do not fit on one,
each holds some of the SAEs and all workers go through the same data.
"""

import dataclasses
import hashlib
import io
import json
import logging
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from sae_ray.artifacts import write_atomically
from sae_ray.chat import ChatTokenizer
from sae_ray.errors import ConfigError
from sae_ray.lm import LanguageModel
from sae_ray.sae.activations import ActivationStream, Feed, Shard
from sae_ray.sae.buffer import TokenBatch
from sae_ray.sae.recipe import Recipe, SAESpec
from sae_ray.sae.sequences import Arrangement
from sae_ray.sae.settings import TrainSettings
from sae_ray.sae.shards import InstanceReader
from sae_ray.sae.train import Guard, Reduce, Step, Trainer, train
from sae_ray.tables import Slice
from sae_ray.tiny.split import is_held_out as is_in_unseen_half

logger = logging.getLogger(__name__)

_CURVE_POINTS = 400
"""Points of a curve that are kept."""

State = dict[str, Any]

FOUND = ".parts"
"""Folder for what each part has found, beside the SAEs."""


@dataclasses.dataclass(frozen=True)
class Task:
    """What is the same for every worker."""

    settings: TrainSettings
    lm: str
    specs: tuple[SAESpec, ...]
    recipe: Recipe
    arrangement: Arrangement
    slices: tuple[Slice, ...]
    repeats: frozenset[int] = frozenset()
    half_is_held_out: bool = False
    """Whether half of the rows is kept from training: those that the embedded model never saw."""

    def is_held_out(self, id: str) -> bool:
        """Say whether a row is kept from training."""
        if self.half_is_held_out:
            return is_in_unseen_half(id)
        first = int.from_bytes(hashlib.md5(id.encode()).digest()[:4], "big")
        return first < self.settings.held_out_share * 2**32

    def reader(self) -> InstanceReader:
        """Return what reads the data."""
        return InstanceReader(
            ChatTokenizer.load(self.lm),
            plain_text=self.arrangement.regime == "bt_p",
            is_held_out=self.is_held_out,
            repeats=self.repeats,
            max_rejected=self.settings.max_rejected,
        )


def share_out(specs: Sequence[SAESpec], num_workers: int) -> list[tuple[SAESpec, ...]]:
    """Place SAEs over workers by what they cost: the widest first, each where least is.

    Raises:
        ConfigError: there are fewer SAEs than workers.
    """
    if len(specs) < num_workers:
        raise ConfigError(
            f"{len(specs)} SAEs cannot be placed on num_workers={num_workers}: give fewer workers, "
            "or placement=data"
        )
    shares: list[list[SAESpec]] = [[] for _ in range(num_workers)]
    for spec in sorted(specs, key=lambda one: -one.d_sae):
        min(shares, key=lambda share: sum(one.d_sae for one in share)).append(spec)
    return [tuple(share) for share in shares]


class Part:
    """One worker's part of a training."""

    def __init__(
        self,
        task: Task,
        rank: int = 0,
        num_workers: int = 1,
        *,
        reduce: Reduce | None = None,
        guard: Guard | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """Load the model, and make the SAEs that this worker trains.

        Args:
            task: what all workers do.
            rank: number of this worker.
            num_workers: how many there are.
            reduce: averages over workers.
            guard: does something on all workers, or raises on all what went wrong on one.
            device: of model and SAEs.
        """
        self._guard = guard or (lambda act: act())
        self.task, self.rank, self.num_workers = task, rank, num_workers
        settings, by_data = task.settings, task.settings.placement == "data"
        self.owns_all = by_data
        specs = task.specs if by_data else share_out(task.specs, num_workers)[rank]
        points = sorted({spec.hook_point for spec in specs})
        self.reader = task.reader()
        stream = ActivationStream(
            LanguageModel.load(task.lm, points, dtype=settings.dtype, device=device),
            self._shards() if by_data else self.reader.shards(task.slices),
            task.arrangement,
            tokens_per_forward=settings.tokens_per_forward,
            seed=settings.seed,
        )
        self.stream = stream
        self.feed = Feed(
            stream,
            batch_tokens=task.recipe.batch_tokens,
            buffer_batches=settings.room_batches,
            seed=settings.seed,
        )
        self._sample: TokenBatch | None = self.feed.sample()
        self.trainer = Trainer(
            specs,
            task.recipe,
            {point: x.shape[1] for point, x in self._sample.activations.items()},
            device=device,
            num_workers=num_workers if by_data else 1,
            reduce=reduce if by_data else None,
            guard=guard if by_data else None,
        )
        self.curves: list[State] = []

    def start(self) -> None:
        """Set scales and first biases from a sample of the data; all workers must."""
        assert self._sample is not None, "a part is started once"
        self.trainer.start(self._sample)
        self._sample = None

    def steps(self) -> Iterator[Step]:
        """Train to the end from wherever this part stands."""
        every = max(1, self.task.recipe.num_steps // _CURVE_POINTS)
        steps = self._guarded_steps()
        for step in steps:
            if step.number % every == 0 or self.is_finished:
                self.curves.append(dataclasses.asdict(step))
            yield step

    def _guarded_steps(self) -> Iterator[Step]:
        """Guard what workers do apart: the reading of data, and where SAEs are placed all of it."""
        guard = self._guard
        if self.owns_all:
            return train(self.trainer, iter(lambda: guard(lambda: next(self.feed)), None))
        steps = train(self.trainer, self.feed)
        return iter(lambda: guard(lambda: next(steps, None)), None)

    @property
    def is_finished(self) -> bool:
        """Whether the last step has been taken."""
        return self.trainer.number >= self.task.recipe.num_steps

    def state(self) -> State:
        """Return all that what follows depends on, and what has been found; SAEs once."""
        state = {
            "num_workers": self.num_workers,
            "feed": self.feed.state_dict(),
            "reader": self.reader.state_dict(),
            "curves": self.curves,
        }
        if self.rank == 0 or not self.owns_all:
            state["trainer"] = self.trainer.state_dict()
        return state

    def load(self, own: State | None, first: State) -> None:
        """Go on from checkpointed states: this worker's, if there was one, and the first's.

        With another number of workers the SAEs go on exactly and the data begins anew.

        Raises:
            ConfigError: they are of another run.
        """
        self._sample = None  # else its room stays beside the one that is loaded
        own = own if first["num_workers"] == self.num_workers else None
        self.trainer.load_state_dict((first if self.owns_all else own or first)["trainer"])
        self.curves = list((first if self.owns_all else own or first)["curves"])
        if own is None:
            logger.warning(
                "there were %d workers and are %d now: the data begins anew at step %d",
                *(first["num_workers"], self.num_workers, self.trainer.number),
            )
            return
        self.feed.load_state_dict(own["feed"])
        self.reader.load_state_dict(own["reader"])

    def finish(self, path: str, model_name: str) -> None:
        """Write the SAEs that are this worker's to write, and then what it has found."""
        settings = self.task.settings
        with tempfile.TemporaryDirectory(prefix="sae-ray-") as folder:
            if self.rank == 0 or not self.owns_all:
                self.trainer.save(
                    Path(folder),
                    model_name=model_name,
                    regime=self.task.arrangement.regime,
                    training_tokens=self.trainer.num_tokens,
                    dataset_path=settings.data or "embedded",
                    # As sae-lens' own store would have to read to see the same.
                    context_size=self.task.arrangement.context_size,
                    prepend_bos=False,
                )
            for file in sorted(one for one in Path(folder).rglob("*") if one.is_file()):
                write_atomically(f"{path}/{file.relative_to(folder)}", file.read_bytes())
        found = {
            "curves": self.curves,
            "counts": dataclasses.asdict(self.stream.counts),
            "num_passes": self.stream.cursor.num_passes,
            **self.reader.state_dict(),
        }
        write_atomically(f"{path}/{FOUND}/{self.rank}.json", json.dumps(found).encode())

    def _shards(self) -> list[Shard]:
        """Return this worker's shards; where none of them holds anything, all of them."""
        mine = self.reader.shards(self.task.slices[self.rank :: self.num_workers])
        if self.num_workers == 1 or any(shard() for shard in mine):
            return mine
        logger.warning("no shard of worker %d holds anything: it reads all others'", self.rank)
        return self.reader.shards(self.task.slices[::-1])


def to_bytes(state: State) -> bytes:
    """Pack a state of tensors and plain values."""
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def from_bytes(content: bytes) -> State:
    """Unpack a state, wherever it was made; nothing in it can run code."""
    return torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
