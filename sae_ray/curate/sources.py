"""Where an index's pool, model and SAE lie, and how each is known again wherever it has gone.

An index records a name and a stamp (sizes and times of change) of each, to look at, and a hash of
its contents, to compare. A stamp that is the same saves reading; what was copied has another one
and is read once more.
"""

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Literal, cast

from fsspec.core import has_magic
from fsspec.implementations.local import LocalFileSystem
from huggingface_hub import hf_hub_download

from sae_ray import tiny
from sae_ray.artifacts import Manifest, Source, explain_storage, hash_file, locate
from sae_ray.errors import ArtifactError
from sae_ray.hub import hub_arguments
from sae_ray.lm import load_config
from sae_ray.pool import plan
from sae_ray.sae.pretrained import resolve

Role = Literal["pool", "lm", "sae"]
ROLES: tuple[Role, ...] = ("pool", "lm", "sae")

EMBEDDED = "embedded"
"""Name of the embedded pool, model and SAE, which lie wherever the library does."""

_EMBEDDED = {"pool": tiny.pool_path, "lm": tiny.lm_path, "sae": tiny.sae_path}
_LM_SUFFIXES = (".safetensors", ".json", ".jinja", ".txt", ".model", ".tiktoken")
_LM_BESIDE = ("generation_config.json", "labels.json")
_SAE_FILES = ("cfg.json", "sae_weights.safetensors")
_CHANGES = ("ETag", "etag", "md5Hash", "LastModified", "last_modified", "updated", "mtime")
"""What stores call that which changes with a file."""


def locate_source(role: Role, name: str) -> str:
    """Return where a source lies: of the embedded ones, where they lie here."""
    return str(_EMBEDDED[role]()) if name == EMBEDDED else name


def locate_model(name: str) -> str:
    """Return where a language model lies; of one on the hub, the name with its revision of now.

    Raises:
        ModelError: it is neither a folder nor on the hub.
    """
    at = locate_source("lm", name)
    if Path(at).is_dir():
        return at
    load_config(at)  # says what is wrong with a name that is nobody's
    return fingerprint("lm", at)


def describe_source(role: Role, name: str) -> Source:
    """Return what an index records of a source; a local path holds from any working directory."""
    known = Path(name).exists() and name != EMBEDDED
    return Source(name=os.path.abspath(name) if known else name, stamp=_stamp(role, name))


def fingerprint(role: Role, name: str) -> str:
    """Return what identifies a source by all that decides results: its contents, or a revision.

    Raises:
        PoolError, ModelError: it cannot be read.
    """
    at = Path(locate_source(role, name))
    if role == "pool":
        with tempfile.TemporaryDirectory(prefix="sae-ray-") as staging:
            return plan(str(at) if name == EMBEDDED else name, staging=staging).fingerprint
    if role == "lm" and not at.is_dir():
        hub = hub_arguments(name)
        repository = hub["pretrained_model_name_or_path"]
        config = hf_hub_download(repository, "config.json", revision=hub["revision"])
        return f"{repository}@{Path(config).parent.name}"  # the folder is named by the revision
    if role == "lm":
        files = [f for f in sorted(at.iterdir()) if f.suffix in _LM_SUFFIXES]
        files = [f for f in files if f.name not in _LM_BESIDE]
    else:
        folder = at if at.is_dir() else resolve(name)
        files = [folder / file for file in _SAE_FILES]
    hashes = [f"{file.name} {hash_file(str(file)).sha256}" for file in files]
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def require_source(role: Role, name: str, manifest: Manifest, index: str) -> None:
    """Refuse a pool, model or SAE that is not the one an index was made with.

    Raises:
        ArtifactError: it holds something else, or is not there.
    """
    made_with = manifest.sources[role]
    stamp = _stamp(role, name)
    if stamp is not None and stamp == made_with.stamp:
        return
    same_name = made_with.name in (name, os.path.abspath(name))
    if stamp is None and same_name and (made_with.stamp is None or role == "pool"):
        return  # a published name; or the pool has gone, and a finished index needs it no more
    if stamp is None and made_with.stamp is not None:
        found = "is not there"
    elif fingerprint(role, name) == manifest.parents[role]:
        return
    else:
        found = "holds something else"
    found = f"which {found} now" if same_name else f"and {name} {found}"
    raise ArtifactError(
        f"the index {index} was made with the {role} {made_with.name}, {found}: give --{role} with "
        "a copy of what it was made with, or index again into another folder"
    )


def _stamp(role: Role, name: str) -> str | None:
    """Return what changes whenever a file may have; None for a name that is no file's."""
    path = locate_source(role, name)
    with explain_storage(path):
        fs, root = locate(path)
        found = fs.glob(root, detail=True) if has_magic(root) else fs.find(root, detail=True)
        marks = []
        for file, info in sorted(cast(dict[str, dict], found).items()):
            if isinstance(fs, LocalFileSystem):
                status = os.stat(file)
                marks.append([file.removeprefix(root), status.st_size, status.st_mtime_ns])
            else:
                change = next((str(info[key]) for key in _CHANGES if key in info), None)
                if change is None:
                    return None
                marks.append([file.removeprefix(root), info["size"], change])
    return hashlib.sha256(repr(marks).encode()).hexdigest() if marks else None
