"""The next round's command, composed of what was kept and dropped.

The page composes it again as the reader ticks rows, so report.js follows the same rules. The line
is for any POSIX shell, and for pasting: a terminal acts on control characters that are pasted into
it, quoted or not, so none are left in the line.
"""

import json
import re
import shlex
from collections.abc import Mapping, Sequence

from pydantic import JsonValue

_PLAIN_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:/@+-]*")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def compose(settings: Mapping[str, str], out: str, keep: Sequence[str], drop: Sequence[str]) -> str:
    """Return the command; `settings` are its other flags, without their dashes."""
    ids = _id_flag("keep", keep) + _id_flag("drop", drop)
    return _head(settings) + ids + _flag("out", out)


def recipe(settings: Mapping[str, str], out: str, keep: Sequence[str], drop: Sequence[str]) -> str:
    """Return what report.js needs to compose the command, as JSON."""
    return ascii_json(
        {
            "head": _head(settings),
            "tail": _flag("out", out),
            "keep": list(keep),
            "drop": list(drop),
        }
    )


def ascii_json(value: JsonValue) -> str:
    """Return JSON without single quotes, control characters or anything past ASCII."""
    text = json.dumps(value, separators=(",", ":"))
    return text.replace("'", "\\u0027").replace("\x7f", "\\u007f")


def _head(settings: Mapping[str, str]) -> str:
    return "python jobs/curate.py" + "".join(_flag(n, v) for n, v in settings.items())


def _flag(name: str, value: str) -> str:
    quoted = shlex.quote(_CONTROL.sub(" ", value))
    return f" --{name}={quoted}" if value.startswith("-") else f" --{name} {quoted}"


def _id_flag(name: str, ids: Sequence[str]) -> str:
    """Separate plain ids by commas; give others as JSON."""
    if not ids:
        return ""
    if all(_PLAIN_ID.fullmatch(one) for one in ids):
        return f" --{name} {','.join(ids)}"
    return f" --{name} '{ascii_json(list(ids))}'"
