"""What a row is called, and which half of a pool no model or SAE has seen."""

import hashlib
import json
from collections.abc import Mapping, Sequence


def conversation_id(messages: Sequence[Mapping[str, str]]) -> str:
    """Return a row's id: 16 hexadecimal digits of the hash of its turns."""
    turns = [[message["role"], message["content"]] for message in messages]
    return hashlib.sha256(json.dumps(turns, ensure_ascii=False).encode()).hexdigest()[:16]


def is_held_out(id: str) -> bool:
    """Say whether a row is kept from all training: first byte of the id's MD5 odd."""
    return hashlib.md5(id.encode()).digest()[0] % 2 == 1
