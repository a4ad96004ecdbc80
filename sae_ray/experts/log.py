"""Log: small numbered files, only ever added, by any number of writers, on any fsspec path."""

import os
import re
import uuid
from pathlib import Path
from typing import cast

from fsspec.implementations.local import LocalFileSystem

from sae_ray.artifacts import locate
from sae_ray.errors import ArtifactError
from sae_ray.storage import explain_storage

_ENTRY = re.compile(r"^(\d{6})\.json$")
_ATTEMPTS = 1000


class Log:
    """Entries 1, 2, ... of a folder, each written once and never again."""

    def __init__(self, path: str) -> None:
        self.path = path

    def entries(self) -> list[bytes]:
        """Return all entries, in the order in which they were added."""
        fs, root = locate(self.path)
        with explain_storage(self.path):
            names = [f"{root}/{number:06}.json" for number in self._numbers()]
            return [cast(bytes, fs.cat_file(name)) for name in names]

    def append(self, entry: bytes) -> int:
        """Add an entry behind all others, and return its number.

        Raises:
            ArtifactError: storage refuses, or others add so fast that there is never a turn.
        """
        number = max(self._numbers(), default=0)
        for _ in range(_ATTEMPTS):
            number += 1
            if _create(f"{self.path}/{number:06}.json", entry):
                return number
        raise ArtifactError(f"{self.path} is written to without a pause: try again later")

    def _numbers(self) -> list[int]:
        fs, root = locate(self.path)
        with explain_storage(self.path):
            if not fs.exists(root):
                return []
            names = [str(name).rsplit("/", 1)[-1] for name in fs.ls(root, detail=False)]
        return sorted(int(match[1]) for name in names if (match := _ENTRY.match(name)))


def _create(path: str, content: bytes) -> bool:
    """Write a file that is not there yet, whole or not at all; False where it is."""
    fs, target = locate(path)
    with explain_storage(path):
        try:
            if isinstance(fs, LocalFileSystem):
                _create_local(Path(target), content)
            else:
                # Object stores: the put is refused if the key exists (If-None-Match).
                fs.pipe_file(target, content, mode="create")
        except FileExistsError:
            return False
    return True


def _create_local(target: Path, content: bytes) -> None:
    """A link to a finished file is refused where its name is taken, which a rename is not."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".write-{uuid.uuid4().hex[:12]}")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
