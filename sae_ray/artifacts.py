"""Folders with a manifest: written once, verified, traceable, on any fsspec path.

    begin  ->  run.json        what is being made: kind, config, parents
    write  ->  shard by shard  each file whole or not there
    finish ->  manifest.json   written last; then run.json and scratch go

A folder with a manifest is finished; one with a run.json alone was interrupted, and the same job
continues it. Names that start with a dot are scratch and never part of an artifact. The content
hash covers kind and files, not when, where or with which library versions they were made, so that
it tells whether two runs gave the same answer.

This module does not know what is in the files.
"""

import contextlib
import enum
import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem
from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from sae_ray.errors import ArtifactError
from sae_ray.storage import explain_storage, write_local

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
RUN = "run.json"

_VERSIONED = ("sae-ray", "numpy", "pyarrow", "ray", "sae-lens", "torch", "transformers")
_CHUNK_BYTES = 1 << 20

Config = Mapping[str, JsonValue]
Record = TypeVar("Record", bound=BaseModel)


class State(enum.Enum):
    """What `begin` found: nothing, the same run interrupted, or the same run finished."""

    NEW = "new"
    INTERRUPTED = "interrupted"
    FINISHED = "finished"


class FileRecord(BaseModel):
    """What a file held when it was written."""

    model_config = ConfigDict(frozen=True)

    sha256: str
    bytes: int


class Source(BaseModel):
    """Where a parent lay: told, and never compared; what it held is."""

    model_config = ConfigDict(frozen=True)

    name: str
    """Path, URL or published name."""
    stamp: str | None = None
    """Changes whenever its files may have, so that unchanged ones need no reading."""


class Run(BaseModel):
    """What a folder is made from: its kind, the settings and the artifacts it was made of."""

    model_config = ConfigDict(frozen=True)

    kind: str
    config: dict[str, JsonValue]
    parents: dict[str, str]
    """Content hashes of the artifacts this one was made from, by their role."""
    sources: dict[str, Source] = {}
    """Where they lay, by their role."""

    def differences(self, other: "Run", *, so_far: bool = False) -> list[str]:
        """Name each setting and parent that two runs do not share; `so_far` those known here."""
        if self.kind != other.kind:
            return [f"kind: {other.kind!r} there, {self.kind!r} here"]
        mine, theirs = self._flat(), other._flat()
        return [
            f"{name}: {other._shown(name)} there, {self._shown(name)} here"
            for name in sorted(mine.keys() if so_far else mine.keys() | theirs.keys())
            if mine.get(name) != theirs.get(name)
        ]

    def _flat(self) -> dict[str, JsonValue]:
        parents = {f"parent {role}": value for role, value in self.parents.items()}
        return {**self.config, **parents}

    def _shown(self, name: str) -> str:
        source = self.sources.get(name.removeprefix("parent "))
        value = self._flat().get(name)
        return f"{source.name} ({str(value)[:12]})" if source else repr(value)


class Manifest(Run):
    """What a finished folder holds and where it came from."""

    schema_version: int
    config_hash: str
    files: dict[str, FileRecord]
    extra: dict[str, JsonValue]
    """Counts and verdicts: rows, rejected, abstained."""
    warnings: list[str]
    versions: dict[str, str]
    created: datetime

    @property
    def content_hash(self) -> str:
        """Hash kind and files: equal for equal results, whenever and wherever they were made.

        Pages for people (.html) say when and where, and are left out.
        """
        files = {n: file.sha256 for n, file in self.files.items() if not n.endswith(".html")}
        return _digest({"kind": self.kind, "files": files})


def config_hash(config: Config) -> str:
    """Return a short name for these settings, whatever the order they are given in."""
    return _digest(config)[:16]


def begin(
    path: str,
    kind: str,
    config: Config,
    parents: Mapping[str, str] | None = None,
    sources: Mapping[str, Source] | None = None,
) -> State:
    """Claim a folder for one run, refusing one that holds anything else."""
    state = inspect(path, kind, config, parents, sources)
    if state is State.NEW:
        write_atomically(f"{path}/{RUN}", _encode(_run(kind, config, parents, sources)))
    return state


def inspect(
    path: str,
    kind: str,
    config: Config,
    parents: Mapping[str, str] | None = None,
    sources: Mapping[str, Source] | None = None,
    *,
    so_far: bool = False,
) -> State:
    """Say what a folder holds of a run, refusing one that holds anything else; write nothing.

    `so_far` means that config and parents are not all known yet: only these are compared.
    """
    run = _run(kind, config, parents, sources)
    finished = _read(Manifest, path, MANIFEST)
    found = finished or _read(Run, path, RUN)
    if found is not None:
        if differences := run.differences(found, so_far=so_far):
            state = "a finished" if finished else "an interrupted"
            raise ArtifactError(
                f"{path} holds {state} {found.kind} of another run ({'; '.join(differences)}): "
                "give another output folder, or delete this one"
            )
        return State.FINISHED if finished else State.INTERRUPTED
    _require_own(path)
    return State.NEW


def require_empty(path: str) -> None:
    """Refuse a folder that holds anything, before work whose settings are still to be found."""
    if found := _read(Manifest, path, MANIFEST) or _read(Run, path, RUN):
        raise ArtifactError(f"{path} holds a {found.kind} already: give another output folder")
    _require_own(path)


def finish(
    path: str,
    extra: Config | None = None,
    warnings: Sequence[str] = (),
    known: Mapping[str, FileRecord] | None = None,
) -> Manifest:
    """Write the manifest of the run that `begin` claimed the folder for, and clear its scratch.

    Files listed in `known` were hashed as they were written and are not read again.
    """
    run = _read(Run, path, RUN)
    assert run is not None, f"finish({path!r}) without begin"
    sizes, known = _list(path), known or {}
    files = {}
    for name in sorted(sizes):
        record = known.get(name)
        written = record is not None and record.bytes == sizes[name]
        files[name] = record if record is not None and written else hash_file(f"{path}/{name}")
    if lost := sorted(known.keys() - files.keys()):
        raise ArtifactError(f"{path} lost files while it was written ({_some(lost)}): run again")
    manifest = Manifest(
        kind=run.kind,
        config=run.config,
        parents=run.parents,
        sources=run.sources,
        schema_version=SCHEMA_VERSION,
        config_hash=config_hash(run.config),
        files=files,
        extra=dict(extra or {}),
        warnings=list(warnings),
        versions=_versions(),
        created=datetime.now(UTC),
    )
    write_atomically(f"{path}/{MANIFEST}", _encode(manifest))
    _clear_scratch(path)
    return manifest


def open_artifact(path: str, kind: str) -> Manifest:
    """Read the manifest of a finished artifact of this kind."""
    manifest = _read(Manifest, path, MANIFEST)
    if manifest is None:
        if _read(Run, path, RUN) is not None:
            raise ArtifactError(f"{path} is not finished: run the job that makes it again")
        raise ArtifactError(
            f"{path} holds no {MANIFEST}: give a folder that a job of sae-ray wrote ({kind} needed)"
        )
    if manifest.kind != kind:
        raise ArtifactError(f"{path} holds a {manifest.kind}, not the {kind} needed: give another")
    return manifest


def is_finished(path: str, kind: str) -> bool:
    """Say whether a folder holds a finished artifact of this kind."""
    manifest = _read(Manifest, path, MANIFEST)
    return manifest is not None and manifest.kind == kind


def verify(path: str) -> None:
    """Read every file again and refuse an artifact that is not what its manifest says."""
    manifest = _read(Manifest, path, MANIFEST)
    if manifest is None:
        raise ArtifactError(f"{path} holds no {MANIFEST}: only finished artifacts can be verified")
    present = _list(path)
    missing = sorted(manifest.files.keys() - present.keys())
    added = sorted(present.keys() - manifest.files.keys())
    changed = [
        name
        for name, record in sorted(manifest.files.items())
        if name in present and hash_file(f"{path}/{name}") != record
    ]
    found = {"missing": missing, "changed": changed, "added": added}
    if any(found.values()):
        what = ", ".join(f"{verb} {_some(names)}" for verb, names in found.items() if names)
        raise ArtifactError(f"{path} is not what its manifest says ({what}): make it again")


def content_hash(path: str, kind: str) -> str:
    """Return the content hash of a finished artifact: how a child names its parent."""
    return open_artifact(path, kind).content_hash


def write_atomically(path: str, content: bytes) -> FileRecord:
    """Write one file so that a reader finds all of it or none, and return its record."""
    fs, target = locate(path)
    with explain_storage(path):
        if isinstance(fs, LocalFileSystem):
            write_local(Path(target), content)
        else:
            # One put: object stores show an object when it is whole.
            fs.pipe_file(target, content)
    return FileRecord(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))


def read_file(path: str) -> bytes:
    """Return the content of one file."""
    fs, target = locate(path)
    with explain_storage(path):
        content = fs.cat_file(target)
    assert isinstance(content, bytes)
    return content


def hash_file(path: str) -> FileRecord:
    """Hash a file as it streams by."""
    fs, target = locate(path)
    digest, size = hashlib.sha256(), 0
    with explain_storage(path), fs.open(target, "rb") as file:
        while chunk := cast(bytes, file.read(_CHUNK_BYTES)):
            digest.update(chunk)
            size += len(chunk)
    return FileRecord(sha256=digest.hexdigest(), bytes=size)


def locate(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return the file system of a path or URL and the path on it, with no stale listing."""
    try:
        fs, root = fsspec.url_to_fs(path)
    except (ImportError, ValueError) as error:
        raise ArtifactError(
            f"{path!r} is on a file system that cannot be reached ({error}): give a local path, "
            "or install what the message asks for (s3:// needs `pip install 'sae-ray[s3]'`)"
        ) from None
    # Other processes write here too, and object stores' listings are cached for ever.
    fs.invalidate_cache()
    return fs, str(root).rstrip("/") or "/"


def _run(
    kind: str,
    config: Config,
    parents: Mapping[str, str] | None,
    sources: Mapping[str, Source] | None,
) -> Run:
    return Run(
        kind=kind, config=dict(config), parents=dict(parents or {}), sources=dict(sources or {})
    )


def _require_own(path: str) -> None:
    if foreign := sorted(_list(path)):
        raise ArtifactError(
            f"{path} holds files that are not an artifact's ({_some(foreign)}): "
            "give a folder that is empty or not there yet"
        )


def _list(path: str) -> dict[str, int]:
    """Return the size of each file of an artifact, by its name below the folder."""
    fs, root = locate(path)
    with explain_storage(path):
        if not fs.exists(root):
            return {}
        if fs.isfile(root):
            raise ArtifactError(f"{path} is a file or lies under one: give a folder")
        found = cast(dict[str, dict[str, Any]], fs.find(root, detail=True))
    names = {name[len(root) :].lstrip("/"): info["size"] for name, info in found.items()}
    return {
        name: size
        for name, size in names.items()
        if name not in (MANIFEST, RUN) and not any(part.startswith(".") for part in name.split("/"))
    }


def _clear_scratch(path: str) -> None:
    fs, root = locate(path)
    fs.rm_file(f"{root}/{RUN}")
    for entry in fs.ls(root, detail=False):
        if str(entry).rstrip("/").rsplit("/", 1)[-1].startswith("."):
            fs.rm(entry, recursive=True)


def _read(model: type[Record], path: str, name: str) -> Record | None:
    fs, root = locate(path)
    try:
        with explain_storage(path):
            content = json.loads(fs.cat_file(f"{root}/{name}"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ArtifactError(f"{path}/{name} is damaged ({error}): make it again") from None
    version = content.get("schema_version", SCHEMA_VERSION) if isinstance(content, dict) else 0
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise ArtifactError(
            f"{path} has schema {version} and this sae-ray reads up to {SCHEMA_VERSION}: upgrade it"
        )
    try:
        return model.model_validate(content)
    except ValidationError as error:
        fields = ", ".join(".".join(map(str, detail["loc"])) for detail in error.errors())
        raise ArtifactError(f"{path}/{name} is damaged ({fields}): make it again") from None


def _encode(model: BaseModel) -> bytes:
    return (json.dumps(model.model_dump(mode="json"), indent=2, sort_keys=True) + "\n").encode()


def _digest(content: object) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in _VERSIONED:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
