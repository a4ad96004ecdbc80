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

from sae_ray.curate.request import Request

Flags = Mapping[str, str | bool | Sequence[str]]
"""A flag's name without its dashes -> its value; True stands alone, as in `--strict`."""

_PLAIN_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:/@+-]*")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def next_flags(request: Request, index: str, out: str) -> dict[str, str | bool | Sequence[str]]:
    """Return the flags that ask the same again, but for the rows that were judged.

    Args:
        request: what was asked.
        index: of the pool.
        out: where its answer lies: what an endpoint wrote this time is read again from there.
    """
    flags: dict[str, str | bool | Sequence[str]] = {
        "task": request.task,
        "index": index,
        "budget_examples": str(request.budget_examples),
    }
    asked = request.model_dump(exclude={*flags, "keep", "drop"}, exclude_defaults=True)
    if request.pseudo_url is not None:
        asked["pseudo_queries"] = f"{out}/pseudo_queries.jsonl"
        del asked["pseudo_url"], asked["pseudo_model"]
    return flags | {n: v if isinstance(v, tuple) else str(v) for n, v in asked.items()}


def next_folder(path: str) -> str:
    """Return the next round's folder: maths -> maths-2 -> maths-3."""
    head, dash, tail = path.rstrip("/").rpartition("-")
    return f"{head}-{int(tail) + 1}" if dash and tail.isdecimal() else f"{path.rstrip('/')}-2"


def compose(settings: Flags, out: str, keep: Sequence[str], drop: Sequence[str]) -> str:
    """Return the command; `settings` are its other flags."""
    judged = _flag("keep", keep) + _flag("drop", drop)
    return _head(settings) + judged + _flag("out", out)


def recipe(settings: Flags, out: str, keep: Sequence[str], drop: Sequence[str]) -> str:
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


def _head(settings: Flags) -> str:
    return "python jobs/curate.py" + "".join(_flag(n, v) for n, v in settings.items())


def _flag(name: str, value: str | bool | Sequence[str]) -> str:
    if isinstance(value, bool):
        return f" --{name}" if value else f" --no-{name}"
    if not isinstance(value, str):
        return _list_flag(name, value)
    quoted = shlex.quote(_CONTROL.sub(" ", value))
    return f" --{name}={quoted}" if value.startswith("-") else f" --{name} {quoted}"


def _list_flag(name: str, items: Sequence[str]) -> str:
    """Separate plain items by commas; give others as JSON."""
    if not items:
        return ""
    if all(_PLAIN_ID.fullmatch(one) for one in items):
        return f" --{name} {','.join(items)}"
    return f" --{name} '{ascii_json(list(items))}'"
