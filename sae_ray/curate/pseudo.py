"""Pseudo-queries: conversations that a model writes from the description alone, as seeds.

They come from a text file (one conversation a line as JSON, or plain prompts) or from any
OpenAI-compatible endpoint. Nothing is asked of a network unless an endpoint is given.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import httpx

from sae_ray.artifacts import write_atomically
from sae_ray.chat import Conversation
from sae_ray.errors import TaskError

_ASK = (
    "Write {num} short, varied examples of what a user would ask of an assistant that is good at "
    "this task, each with a fitting answer.\nTask: {task}\n"
    'Reply with a JSON list of objects {{"prompt": ..., "response": ...}} and nothing else.'
)


def read_pseudo_queries(path: str | Path) -> list[Conversation]:
    """Read conversations from a file: JSON lines of prompt and response, or one prompt a line.

    Raises:
        TaskError: the file is missing or holds none.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(
            f"pseudo_queries={str(path)!r} cannot be read ({error}): give a UTF-8 text file with "
            "one prompt a line, or JSON lines of prompt and response"
        ) from error
    found = [_conversation(line, i) for i, line in enumerate(lines) if line.strip()]
    if not found:
        raise TaskError(f"pseudo_queries={str(path)!r} is empty: write one prompt a line")
    return found


def ask_for_pseudo_queries(
    task: str,
    *,
    base_url: str,
    model: str,
    api_key: str | None = None,
    num: int = 16,
    timeout_s: float = 120.0,
) -> list[Conversation]:
    """Let an OpenAI-compatible endpoint write conversations for a task.

    Raises:
        TaskError: it does not answer, or not with what was asked for.
    """
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    body = {
        "model": model,
        "temperature": 0.8,
        "messages": [{"role": "user", "content": _ASK.format(num=num, task=task)}],
    }
    url = f"{base_url.rstrip('/')}/chat/completions"
    try:
        reply = httpx.post(url, json=body, headers=headers, timeout=timeout_s)
        reply.raise_for_status()
        content = reply.json()["choices"][0]["message"]["content"]
    except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
        raise TaskError(
            f"the endpoint {base_url} gave no chat completion ({error}): an OpenAI-compatible URL "
            "and a model that it serves are needed; check both, or give a file"
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


def _parse(content: object, base_url: str) -> list[Conversation]:
    text = content if isinstance(content, str) else ""
    try:
        found = json.loads(text[text.index("[") : text.rindex("]") + 1])
        return [_turns(one["prompt"], one.get("response"), i) for i, one in enumerate(found)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TaskError(
            f"the endpoint {base_url} answered {text[:80]!r}: a JSON list of prompt and response "
            "was asked for; try a more capable model, or give a file"
        ) from error


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
    messages = [{"role": role, "content": text} for role, text in texts if text is not None]
    if not all(isinstance(one["content"], str) for one in messages):
        raise TypeError("prompt and response are text")
    return Conversation(f"pseudo-{number}", messages)  # pyright: ignore[reportArgumentType]
