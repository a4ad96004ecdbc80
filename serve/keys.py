"""API keys: made once, kept as hashes, compared in constant time."""

import hashlib
import hmac
import logging
import os
import secrets
import sys
from pathlib import Path

from sae_ray.errors import ConfigError

logger = logging.getLogger(__name__)

_PREFIX = "sk-moie-"
_HEX = set("0123456789abcdef")
_MAKE = "make it with python -m serve.keys FILE NAME"


class Keys:
    """Who may ask: everyone, where no file of keys is given, else who stands in the file now."""

    def __init__(self, path: str | None = None) -> None:
        """Read a file of SHA-256 hashes, one a line, a name behind each.

        Raises:
            ConfigError: the file cannot be read, or holds something else.
        """
        self._path = path
        self._stamp = _stamp(path)
        self._hashes = () if path is None else _read(path)

    @property
    def required(self) -> bool:
        """Say whether a key must be given."""
        return self._path is not None

    def admits(self, authorization: str | None) -> bool:
        """Say whether a request's Authorization header holds a key that is known."""
        if self._path is None:
            return True
        self._look(self._path)
        scheme, _, key = (authorization or "").partition(" ")
        given = _hash(key.strip())
        # All of them are compared, so that the time says nothing of which one it was.
        found = [hmac.compare_digest(given, one) for one in self._hashes]
        return scheme.lower() == "bearer" and any(found)

    def _look(self, path: str) -> None:
        """Read the file again where it has changed; nobody is let in while it cannot be read."""
        if (stamp := _stamp(path)) == self._stamp:
            return
        self._stamp = stamp
        try:
            self._hashes = _read(path)
        except ConfigError as error:
            self._hashes = ()
            logger.error("nobody is let in: %s", error)


def _stamp(path: str | None) -> tuple[int, int, int] | None:
    """Return what changes with a file; None where there is none."""
    if path is None:
        return None
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def _read(path: str) -> tuple[str, ...]:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--keys {path} cannot be read ({error}): {_MAKE}") from None
    hashes = tuple(line.split()[0] for line in lines if line.strip())
    if not hashes or any(len(one) != 64 or set(one) - _HEX for one in hashes):
        raise ConfigError(f"--keys {path} holds no hashes of keys, one a line: {_MAKE}")
    return hashes


def add_key(path: str, name: str) -> str:
    """Make a key, add its hash to a file that only its owner reads, and return the key."""
    key = _PREFIX + secrets.token_urlsafe(32)
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    with os.fdopen(file, "a", encoding="utf-8") as stream:
        stream.write(f"{_hash(key)} {name}\n")
    return key


def _hash(key: str) -> str:
    """Return a key's hash: it is random enough that no salt and no slowness is needed."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


if __name__ == "__main__":
    sys.stdout.write(f"{add_key(sys.argv[1], sys.argv[2])}\n")
