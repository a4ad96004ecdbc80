"""A prompt at which a person judges rows until the selection suits them."""

import re
from collections.abc import Callable

from sae_ray.curate.request import Request
from sae_ray.explain.curation import Curator

HELP = "numbers to keep as +1 +4, to drop as -2; Enter shows others, w writes, q leaves"

_JUDGED = re.compile(r"([+-])(\d+)")
_SHOWN_CHARS = 160


def refine(
    curator: Curator, request: Request, ask: Callable[[str], str], say: Callable[[str], None]
) -> Request | None:
    """Show rows and take judgements, round after round; return the request to write, or None.

    Args:
        curator: an open index.
        request: what is asked so far.
        ask: shows a prompt and returns a line; `input` will do.
        say: shows a line; `print` will do.
    """
    seen: set[int] = set()
    while True:
        outcome = curator.answer(request)
        for warning in outcome.warnings():
            say(f"warning: {warning}")
        rows = curator.to_judge(outcome, seen)
        seen.update(row.row for row in rows)
        for number, row in enumerate(rows, start=1):
            said = " ".join(row.conversation.text().split())
            say(f"{number:3}. {said[:_SHOWN_CHARS]}")
        if not rows:
            say("no other row is left to judge")
        try:
            reply = ask(f"{HELP}\n> ").strip()
        except EOFError:
            reply = "q"
        if reply == "w":
            return request
        if reply == "q":
            say("left without writing")
            return None
        judged: dict[str, str] = {}
        if reply and not _JUDGED.search(reply):
            say(f"{reply!r} judges nothing: write +3 to keep row 3, -3 to drop it")
        for sign, number in _JUDGED.findall(reply):
            if 1 <= int(number) <= len(rows):
                judged[rows[int(number) - 1].conversation.id] = sign
            else:
                say(f"there is no row {number}: give 1 to {len(rows)}")
        request = request.model_copy(
            update={
                "keep": (*request.keep, *(one for one, sign in judged.items() if sign == "+")),
                "drop": (*request.drop, *(one for one, sign in judged.items() if sign == "-")),
            }
        )
