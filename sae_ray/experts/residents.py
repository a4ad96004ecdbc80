"""Residents: the experts in memory beside one base, loaded when asked for, evicted under a cap."""

import contextlib
import dataclasses
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedModel

from sae_ray.adapters.latent import LatentConfig, LatentLayer
from sae_ray.errors import BusyError, ConfigError, ModelError, RequestError
from sae_ray.experts.card import ExpertCard
from sae_ray.experts.registry import Expert, ExpertRegistry
from sae_ray.experts.stacked import Factors, read_config, read_lora

NOBODY = "__base__"
"""What a row without a latent edit is called."""


@dataclasses.dataclass
class Resident:
    """An expert in memory."""

    id: str
    num_bytes: int
    factors: Mapping[str, Factors]
    """Of a LoRA; none where it edits latents."""
    edits_latents: bool
    pins: int = 0
    """How many requests, waiting or in the batch, are to be answered by it."""


class LatentRows:
    """The latent edits of a batch's rows, inside a model: each row its own, or none."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._adapted: PeftModel | None = None
        self._layers: list[LatentLayer] = []

    def load(self, id: str, folder: Path) -> int:
        """Put an expert's edits into the model; return what they take, in bytes.

        Raises:
            ModelError: they do not fit the model, or the SAE that they were made on is not there.
        """
        try:
            if self._adapted is None:
                self._adapted = PeftModel.from_pretrained(self._model, str(folder), adapter_name=id)
            else:
                self._adapted.load_adapter(str(folder), adapter_name=id)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise ModelError(
                f"expert {id} does not fit the model ({str(error).splitlines()[0]}): serve it with "
                "the model that it was trained on"
            ) from error
        self._layers = [one for one in self._model.modules() if isinstance(one, LatentLayer)]
        for layer in self._layers:
            layer.set_adapter([])  # whose rows are whose is said before each forward
        self.look_at(())
        edits = [layer.edit(id) for layer in self._layers if id in layer.latent_edit]
        # A SAE that several share is counted for each: who stays longest keeps it.
        return sum(one.nbytes for edit in edits for one in (*edit.parameters(), *edit.buffers()))

    def drop(self, id: str) -> None:
        """Take an expert's edits out of the model."""
        assert self._adapted is not None
        self._adapted.delete_adapter(id)

    def look_at(self, ids: Sequence[str]) -> None:
        """Say whose each row of the next forward is."""
        for layer in self._layers:
            layer.rows = list(ids)


class Residents:
    """Experts of a registry as they are needed, at most so many bytes of them at once."""

    def __init__(
        self,
        model: PreTrainedModel,
        registry: ExpertRegistry | None,
        max_bytes: int,
        require: Callable[[Expert], None],
    ) -> None:
        self._model = model
        self._registry = registry
        self._require = require
        self.max_bytes = max_bytes
        self.latents = LatentRows(model)
        self.lock = threading.Lock()
        """Held while a forward runs, and while what it reads is changed."""
        self.wanted = threading.Event()
        """Set while someone waits for that lock, which whoever steps would take again at once."""
        self._table = threading.Lock()
        self._loading = threading.Lock()
        self._by_id: dict[str, Resident] = {}
        """The one that was used last comes last."""

    @property
    def ids(self) -> tuple[str, ...]:
        """Who is in memory."""
        with self._table:
            return tuple(self._by_id)

    @property
    def num_bytes(self) -> int:
        """Return what all of them take, in bytes."""
        with self._table:
            return self._num_bytes()

    def pin(self, id: str) -> Resident:
        """Return an expert and keep it in memory until it is unpinned as often as pinned.

        Raises:
            BusyError: those in use leave it no room.
            RequestError: it cannot share a batch.
            ConfigError: it is larger than all the room there is.
            RegistryError, ModelError: its files are not what was registered, or do not fit.
        """
        if (found := self._pinned(id)) is not None:
            return found
        with self._loading:
            if (found := self._pinned(id)) is not None:  # loaded by who was here before
                return found
            resident = self._load(id)
            try:
                self._make_room(resident.num_bytes)
            except (BusyError, ConfigError):
                self._drop(resident)
                raise
            resident.pins = 1
            with self._table:
                self._by_id[id] = resident
            return resident

    def unpin(self, resident: Resident) -> None:
        """Let an expert go when its place is needed."""
        with self._table:
            resident.pins -= 1

    def _pinned(self, id: str) -> Resident | None:
        with self._table:
            resident = self._by_id.pop(id, None)
            if resident is not None:
                self._by_id[id] = resident  # as the last one
                resident.pins += 1
            return resident

    def _num_bytes(self) -> int:
        return sum(one.num_bytes for one in self._by_id.values())

    @contextlib.contextmanager
    def _between_forwards(self) -> Iterator[None]:
        self.wanted.set()
        with self.lock:
            self.wanted.clear()
            yield

    def _load(self, id: str) -> Resident:
        if self._registry is None:
            raise RequestError("there is no registry, so that only the base answers: give one")
        expert = self._registry.find(id)
        self._require(expert)
        card = expert.card
        size = sum(file.bytes for name, file in card.files.items() if name.endswith("safetensors"))
        self._make_room(size)  # before anything is fetched
        with tempfile.TemporaryDirectory(prefix="sae-ray-") as scratch:
            folder = self._registry.fetch(id, Path(scratch))
            config = read_config(folder)
            if isinstance(config, LatentConfig):
                with self._between_forwards():
                    size = self.latents.load(id, folder)
                return Resident(id, size, {}, edits_latents=True)
            factors = read_lora(folder, config, self._model)
        return Resident(id, sum(one.num_bytes for one in factors.values()), factors, False)

    def _make_room(self, size: int) -> None:
        """Evict who was not used for longest."""
        if size > self.max_bytes:
            raise ConfigError(
                f"this expert takes {size:,} bytes and all experts together may take "
                f"{self.max_bytes:,}: raise adapter_memory_mb"
            )
        with self._table:
            idle = [one for one in self._by_id.values() if not one.pins]
            if self._num_bytes() - sum(one.num_bytes for one in idle) + size > self.max_bytes:
                raise BusyError(
                    "the experts in use leave no room for another one: ask again in a moment, or "
                    "raise adapter_memory_mb"
                )
            gone = []
            while self._num_bytes() + size > self.max_bytes:
                gone.append(self._by_id.pop(idle.pop(0).id))
        for one in gone:
            self._drop(one)

    def _drop(self, resident: Resident) -> None:
        if resident.edits_latents:
            with self._between_forwards():
                self.latents.drop(resident.id)


def require_servable(card: ExpertCard) -> None:
    """Refuse an expert that no batch can be shared with.

    Raises:
        RequestError: it is a whole model.
    """
    if card.adapter == "full":
        raise RequestError(
            f"expert {card.name} is a whole model of its own (adapter=full) and cannot share the "
            "base: serve it as a base, or train it as an adapter"
        )
