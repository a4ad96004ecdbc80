"""What disks and object stores refuse, told in one line; and a local file written whole or not.

This module does not know what is stored.
"""

import contextlib
import errno
import os
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

from sae_ray.errors import ArtifactError

# What filesystems raise beside OSError; looked up, not imported, since most are not installed.
_FOREIGN_ERRORS = (
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
    ("aiohttp", "ClientError"),
    ("httpx", "HTTPError"),
    ("gcsfs.retry", "HttpError"),
    ("azure.core.exceptions", "AzureError"),
)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
_UNDER_A_FILE = (errno.EEXIST, errno.ENOTDIR)


def storage_errors() -> tuple[type[BaseException], ...]:
    """Return what storage raises, of the packages that are loaded."""
    loaded = [(sys.modules.get(module), name) for module, name in _FOREIGN_ERRORS]
    foreign = [getattr(module, name) for module, name in loaded if hasattr(module, name)]
    return (OSError, *foreign)


@contextlib.contextmanager
def explain_storage(path: str) -> Iterator[None]:
    """Turn what storage refuses into an error that says what to do; what is not there stays so."""
    try:
        yield
    except FileNotFoundError:
        raise
    except storage_errors() as error:
        raise ArtifactError(told(path, error)) from error


def is_refusal(error: BaseException) -> bool:
    """Say whether storage refused, which a person can put right, rather than that code is wrong."""
    if not isinstance(error, OSError):
        return isinstance(error, storage_errors())
    refused = isinstance(error, PermissionError | ConnectionError | TimeoutError)
    return refused or error.errno in (*_FULL, *_FORBIDDEN)


def told(path: str, error: BaseException) -> str:
    """Say what storage refused, and what to do."""
    number = error.errno if isinstance(error, OSError) else None
    if number in _FULL:
        return (
            f"no space left to write {path}: free some, then run the same command again; it "
            "continues where it stopped"
        )
    if number in _FORBIDDEN and "://" not in path:
        return f"{path} may not be used ({os.strerror(number or 0)}): give a path that may"
    if number in _UNDER_A_FILE:
        return f"{path} is a file or lies under one: give a folder"
    line = (str(error).strip().splitlines() or [""])[0]
    return (
        f"{path} cannot be reached ({type(error).__name__}: {line}): check the address, the rights "
        "and, for remote storage, the credentials in its environment variables"
    )


def write_local(target: Path, content: bytes) -> None:
    """Write a file that appears under its name only when whole, and is on the disk by then."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".write-{uuid.uuid4().hex[:12]}")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
