"""Filled pages: a template and data from elsewhere made into one file that is safe by construction.

jinja2 escapes every value, the content security policy lets nothing load or run but the page's own
style and script (by their hashes), and characters that would hide or reorder text are replaced by
their names at the very end.
"""

import base64
import hashlib
from collections.abc import Iterator, Mapping
from importlib import resources

import jinja2
from markupsafe import Markup


def fill(template: str, values: Mapping[str, object], *, style: str, script: str | None) -> str:
    """Return a page that needs no network, of files that lie beside this one."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    own_style, own_script = _asset(style), _asset(script) if script else None
    runs = f"; script-src '{_csp_hash(own_script)}'" if own_script else ""
    frame = {
        "policy": f"default-src 'none'; style-src '{_csp_hash(own_style)}'{runs}; base-uri 'none'; "
        "form-action 'none'",
        "style": Markup(own_style),
        "script": Markup(own_script or ""),
    }
    page = environment.from_string(_asset(template)).render({**values, **frame})
    return page.lstrip().translate(_VISIBLE)


def _unseen() -> Iterator[int]:
    """Yield code points that show nothing, reorder their neighbours or cannot be written."""
    for start, end in (
        (0x7F, 0xA0),
        (0x61C, 0x61D),
        (0x200B, 0x200C),
        (0x200E, 0x2010),
        (0x2028, 0x202F),
        (0x2060, 0x2070),
        (0xD800, 0xE000),  # lone surrogates
        (0xFDD0, 0xFDF0),
        (0xFEFF, 0xFF00),
        (0xFFF0, 0xFFFC),
        (0xE0000, 0xE0080),
    ):
        yield from range(start, end)


_VISIBLE = {code: f"⟨U+{code:04X}⟩" for code in _unseen()} | {
    code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"
}


def _asset(name: str) -> str:
    return resources.files("sae_ray.explain").joinpath(name).read_text(encoding="utf-8")


def _csp_hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
