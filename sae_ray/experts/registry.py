"""ExpertRegistry: cards and adapters, only ever added, and which expert of a name is active.

    experts/<id>/card.json, adapter/...    written once; the id is the hash of the card
    log/000001.json, ...                   what happened: register, activate, retire

The log alone says what there is, in which order and in which state, so that an activation is one
new file: readers see it or they do not. Writers on any number of machines may add at once. An
expert is served only through `fetch`, which refuses bytes that are not those of its card.

This module does not know what an adapter is.
"""

import dataclasses
import logging
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from sae_ray.artifacts import read_file, write_atomically
from sae_ray.errors import ArtifactError, RegistryError, SaeRayError
from sae_ray.experts.card import ADAPTER, ExpertCard, Status, hash_of
from sae_ray.experts.files import read_checked, require_weights
from sae_ray.experts.log import Log
from sae_ray.storage import write_local

logger = logging.getLogger(__name__)

Action = Literal["register", "activate", "retire"]


class Event(BaseModel):
    """One thing that happened to an expert."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    action: Action
    id: str
    name: str
    reason: str | None
    """Why it was retired, or activated although it does not beat its base."""
    forced: bool
    at: datetime


@dataclasses.dataclass(frozen=True)
class Expert:
    """An expert as the registry has it."""

    id: str
    """The hash of its card's file."""
    card: ExpertCard
    version: int
    """1 for the first of its name that was registered."""
    status: Status
    events: tuple[Event, ...]

    @property
    def forced_because(self) -> str | None:
        """Return why it is active without beating its base, if it is."""
        last = next((e for e in reversed(self.events) if e.action == "activate"), None)
        return last.reason if last is not None and last.forced else None


class ExpertRegistry:
    """The experts of one folder or URL."""

    def __init__(self, path: str) -> None:
        self.path = path.rstrip("/")
        self._log = Log(f"{self.path}/log")
        self._broken: dict[str, tuple[str, SaeRayError]] = {}
        """Name of experts whose cards cannot be read, and what is wrong with them."""

    def register(self, card: ExpertCard, adapter: str) -> Expert:
        """Add an expert as a candidate; one that is there already is left as it is.

        Args:
            card: what it is.
            adapter: folder or URL of its files, which must be those of the card.

        Raises:
            RegistryError: files are missing, changed, empty or of a kind that may hold code.
        """
        known = self._experts().get(card.id)
        if known is not None and self._is_whole(known):
            return known
        for name, record in sorted(card.files.items()):
            content = read_checked(f"{adapter}/{name}", record)
            if name.endswith(".safetensors"):
                require_weights(f"{adapter}/{name}", content)
            write_atomically(f"{self.path}/experts/{card.id}/{ADAPTER}/{name}", content)
        write_atomically(self._card(card.id), card.encode())
        if known is None and card.id not in self._broken:
            self._add("register", card)
        return self._experts()[card.id]

    def _is_whole(self, expert: Expert) -> bool:
        try:
            self.verify(expert.id)
        except RegistryError:
            return False
        return True

    def experts(self) -> list[Expert]:
        """Return all experts, by name and version."""
        return sorted(self._experts().values(), key=lambda one: (one.card.name, one.version))

    def find(self, expert: str) -> Expert:
        """Find an expert by id (or its beginning), `name@version`, or the active one by name.

        Raises:
            RegistryError: there is none, or there are several.
        """
        experts = self.experts()
        name, _, version = expert.partition("@")
        found = [one for one in experts if one.card.name == name]
        for id, (broken, error) in self._broken.items():
            if (broken == name and not found) or (len(expert) >= 4 and id.startswith(expert)):
                raise error
        if version:
            found = [one for one in found if str(one.version) == version]
        elif found:
            found = [one for one in found if one.status == "active"] or found[-1:]
        else:
            found = [one for one in experts if len(expert) >= 4 and one.id.startswith(expert)]
        if len(found) != 1:
            known = ", ".join(f"{one.card.name}@{one.version}" for one in experts) or "none"
            what = "is not in" if not found else "means several experts of"
            raise RegistryError(
                f"expert {expert!r} {what} {self.path}, which holds {known}: give an id, a name, "
                "or name@version"
            )
        return found[0]

    def active(self) -> list[Expert]:
        """Return the experts that are in use: at most one of each name."""
        return [one for one in self.experts() if one.status == "active"]

    def activate(self, expert: str, *, force_reason: str | None = None) -> Expert:
        """Put an expert into use in place of any other of its name.

        Args:
            expert: as `find` takes it.
            force_reason: why it is to be used although it does not beat its base; recorded.

        Raises:
            RegistryError: it does not beat its base beyond the interval, and no reason is given.
        """
        found = self.find(expert)
        card, forced = found.card, not found.card.beats_base
        if forced and not (force_reason or "").strip():
            raise RegistryError(
                f"{card.name}@{found.version} {_shortfall(card)}: only experts that beat their "
                "base on their held-out rows become active; train on more or better rows, or give "
                "a reason to use it all the same (--force_reason)"
            )
        self._add("activate", card, force_reason if forced else None, forced)
        return self.find(found.id)

    def retire(self, expert: str, reason: str | None = None) -> Expert:
        """Take an expert out of use; its card and files stay."""
        found = self.find(expert)
        self._add("retire", found.card, reason)
        return self.find(found.id)

    def fetch(self, expert: str, folder: Path) -> Path:
        """Copy an expert's files into a folder, each checked against the card on the way.

        Raises:
            RegistryError: a file is missing, or is not what was registered.
        """
        found = self.find(expert)
        for name, record in sorted(found.card.files.items()):
            write_local(folder / name, read_checked(self._file(found.id, name), record))
        return folder

    def verify(self, expert: str) -> Expert:
        """Read all of an expert's files again and refuse one that was changed."""
        found = self.find(expert)
        for name, record in sorted(found.card.files.items()):
            read_checked(self._file(found.id, name), record)
        return found

    def _experts(self) -> dict[str, Expert]:
        """Replay the log."""
        events: dict[str, list[Event]] = {}
        status: dict[str, Status] = {}
        versions: dict[str, int] = {}
        for event in map(self._event, self._log.entries()):
            mine = events.setdefault(event.id, [])
            if event.action == "register" and not mine:
                others = {id for id, seen in events.items() if seen and seen[0].name == event.name}
                versions[event.id] = len(others) + 1
                status[event.id] = "candidate"
            if event.action == "activate":
                for id, seen in events.items():
                    if seen and seen[0].name == event.name and status[id] == "active":
                        status[id] = "retired"
                status[event.id] = "active"
            if event.action == "retire":
                status[event.id] = "retired"
            mine.append(event)
        experts, self._broken = {}, {}
        for id, seen in events.items():
            try:
                card = self._read_card(id)
            except (RegistryError, ArtifactError) as error:
                self._broken[id] = seen[0].name, error
                logger.warning("%s@%d is left out: %s", seen[0].name, versions[id], error)
            else:
                experts[id] = Expert(id, card, versions[id], status[id], tuple(seen))
        return experts

    def _event(self, entry: bytes) -> Event:
        try:
            return Event.model_validate_json(entry)
        except ValidationError:
            raise RegistryError(
                f"{self._log.path} holds an entry that is none of a registry's: restore it from a "
                "copy, or start another registry"
            ) from None

    def _read_card(self, id: str) -> ExpertCard:
        place = self._card(id)
        try:
            content = read_file(place)
        except FileNotFoundError:
            raise RegistryError(f"{place} is gone: restore it, or register it again") from None
        # Of the bytes as they are: a later card may have fields that this one was written without.
        if hash_of(content) != id:
            raise RegistryError(f"{place} was changed since it was registered: restore it")
        return ExpertCard.decode(content, place)

    def _add(
        self, action: Action, card: ExpertCard, reason: str | None = None, forced: bool = False
    ) -> None:
        now = datetime.now(UTC)
        event = Event(
            action=action, id=card.id, name=card.name, reason=reason, forced=forced, at=now
        )
        self._log.append(event.model_dump_json().encode())

    def _card(self, id: str) -> str:
        return f"{self.path}/experts/{id}/card.json"

    def _file(self, id: str, name: str) -> str:
        return f"{self.path}/experts/{id}/{ADAPTER}/{name}"


def _shortfall(card: ExpertCard) -> str:
    if not card.measures:
        return "was not measured against its base"
    first = card.measures[0]
    return (
        f"does not beat its base ({first.name}: {first.base:.4g} to {first.expert:.4g}, gain "
        f"{first.gain:.4g} [{first.low:.4g}, {first.high:.4g}])"
    )
