"""Pseudo-queries: conversations that a model writes from the description alone, as seeds.

They come from a text file (one conversation a line as JSON, or plain prompts) or from any
OpenAI-compatible endpoint. Nothing is asked of a network unless an endpoint is given, and its key
goes into the request's header and nowhere else.
"""

import json
import time
from collections.abc import Sequence

import httpx

from sae_ray.artifacts import read_file, write_atomically
from sae_ray.chat import Conversation
from sae_ray.errors import TaskError

_ASK = (
    "Write {num} short, varied examples of what a user would ask of an assistant that is good at "
    "this task, each with a fitting answer.\nTask: {task}\n"
    'Reply with a JSON list of objects {{"prompt": ..., "response": ...}} and nothing else.'
)
_REPETITIONS = 2
_BUSY = (429, 500, 502, 503, 504)
"""Answers after which the same request may succeed a little later."""
_LONGEST_WAIT_S = 60.0
_FORBIDDEN = (401, 403)
_SHOWN_CHARS = 200


def read_pseudo_queries(path: str) -> list[Conversation]:
    """Read conversations from a file: JSON lines of prompt and response, or one prompt a line.

    Raises:
        TaskError: the file is missing or holds none.
    """
    try:
        lines = read_file(path).decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(
            f"pseudo_queries={path!r} cannot be read ({error}): give a UTF-8 text file with "
            "one prompt a line, or JSON lines of prompt and response"
        ) from error
    found = [_conversation(line, i) for i, line in enumerate(lines) if line.strip()]
    if not found:
        raise TaskError(f"pseudo_queries={path!r} is empty: write one prompt a line")
    return found


def ask_for_pseudo_queries(
    task: str,
    *,
    base_url: str,
    model: str,
    api_key: str | None = None,
    num: int = 16,
    timeout_s: float = 120.0,
    wait_s: float = 1.0,
) -> list[Conversation]:
    """Let an OpenAI-compatible endpoint write conversations for a task.

    Args:
        task: what a model should get good at, in a sentence.
        base_url: the endpoint up to and with its version: `https://host/v1`.
        model: one that it serves.
        api_key: its key, if it wants one.
        num: conversations to ask for.
        timeout_s: longest wait for an answer.
        wait_s: before the first repetition, where it is busy and does not say how long; then twice
            that.

    Raises:
        TaskError: it does not answer, or not with what was asked for.
    """
    body = {
        "model": model,
        "temperature": 0.8,
        "messages": [{"role": "user", "content": _ASK.format(num=num, task=task)}],
    }
    reply = _post(_completions_url(base_url), _header(api_key), body, timeout_s, wait_s)
    if reply.status_code != httpx.codes.OK:
        key = "; put its key in OPENAI_API_KEY" if reply.status_code in _FORBIDDEN else ""
        raise TaskError(
            f"the endpoint {base_url} answered {reply.status_code} {reply.reason_phrase} "
            f"({_excerpt(reply.text, api_key)}): an OpenAI-compatible URL and a model that it "
            f"serves are needed{key}; or give a file as pseudo_queries"
        )
    try:
        content = reply.json()["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise TaskError(
            f"the endpoint {base_url} answered {_excerpt(reply.text, api_key)}, which is no chat "
            "completion: an OpenAI-compatible URL is needed, often one that ends in /v1"
        ) from error
    return _parse(content, base_url)


def write_pseudo_queries(path: str, conversations: Sequence[Conversation]) -> None:
    """Write conversations so that `read_pseudo_queries` reads them."""
    lines = []
    for one in conversations:
        texts = {message["role"]: message["content"] for message in one.messages}
        row = {"prompt": texts["user"]} | (
            {"response": texts["assistant"]} if "assistant" in texts else {}
        )
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_atomically(path, "".join(lines).encode("utf-8", "replace"))


def _completions_url(base_url: str) -> httpx.URL:
    try:
        url = httpx.URL(f"{base_url.rstrip('/')}/chat/completions")
    except httpx.InvalidURL as error:
        raise TaskError(f"pseudo_url={base_url!r} is no URL ({error}): give https://...") from error
    if url.scheme not in ("http", "https") or not url.host:
        raise TaskError(
            f"pseudo_url={base_url!r} is not on the web: give https://... or http://..."
        )
    if url.userinfo or url.query:
        raise TaskError(
            f"pseudo_url on {url.host} holds a password or a query, and URLs are written to the "
            "manifest: give the plain address, and its key in OPENAI_API_KEY"
        )
    return url


def _header(api_key: str | None) -> dict[str, str]:
    if not api_key:
        return {}
    if not (api_key.isascii() and api_key.isprintable()):
        raise TaskError(
            "OPENAI_API_KEY holds a line break or a character that no key has: set it again"
        )
    return {"Authorization": f"Bearer {api_key}"}


def _post(
    url: httpx.URL, headers: dict[str, str], body: dict, timeout_s: float, wait_s: float
) -> httpx.Response:
    """Return the first answer that is not `busy`, or the last."""
    with httpx.Client(headers=headers, timeout=timeout_s) as client:
        reply = _post_once(client, url, body)
        for repetition in range(_REPETITIONS):
            if reply.status_code not in _BUSY:
                break
            asked = reply.headers.get("retry-after", "")
            wait = float(asked) if asked.isdecimal() else wait_s * 2**repetition
            time.sleep(min(wait, _LONGEST_WAIT_S))
            reply = _post_once(client, url, body)
    return reply


def _post_once(client: httpx.Client, url: httpx.URL, body: dict) -> httpx.Response:
    try:
        return client.post(url, json=body)
    except httpx.TimeoutException as error:
        raise TaskError(
            f"the endpoint {url} has not answered for {client.timeout.read:g} s: try again, take "
            "a faster model, or give a file as pseudo_queries"
        ) from error
    except httpx.HTTPError as error:
        raise TaskError(
            f"the endpoint {url} cannot be reached ({error}): check address and network, or give "
            "a file as pseudo_queries"
        ) from error


def _excerpt(text: str, api_key: str | None) -> str:
    """Return how an answer begins, without the key that it may repeat."""
    return repr((text.replace(api_key, "[key]") if api_key else text)[:_SHOWN_CHARS])


def _parse(content: object, base_url: str) -> list[Conversation]:
    text = content if isinstance(content, str) else ""
    try:
        found = json.loads(text[text.index("[") : text.rindex("]") + 1])
        conversations = [
            _turns(one["prompt"], one.get("response"), i) for i, one in enumerate(found)
        ]
        if not conversations:
            raise ValueError("the list is empty")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TaskError(
            f"the endpoint {base_url} answered {text[:80]!r}: a JSON list of prompt and response "
            "was asked for; try a more capable model, or give a file as pseudo_queries"
        ) from error
    return conversations


def _conversation(line: str, number: int) -> Conversation:
    if line.lstrip().startswith("{"):
        try:
            raw = json.loads(line)
            return _turns(raw["prompt"], raw.get("response"), number)
        except (ValueError, KeyError, TypeError) as error:
            raise TaskError(
                f"pseudo_queries line {number + 1} is {line[:60]!r}: a line is a prompt, or JSON "
                "with prompt and response; mend it"
            ) from error
    return _turns(line.strip(), None, number)


def _turns(prompt: object, response: object, number: int) -> Conversation:
    texts: Sequence[tuple[str, object]] = (("user", prompt), ("assistant", response))
    messages = [
        {"role": role, "content": text}
        for role, text in texts
        if role == "user" or text is not None
    ]
    if not all(isinstance(one["content"], str) and one["content"].strip() for one in messages):
        raise TypeError("prompt and response are text")
    return Conversation(f"pseudo-{number}", messages)  # pyright: ignore[reportArgumentType]
