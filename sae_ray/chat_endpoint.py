"""ChatEndpoint: any OpenAI-compatible chat endpoint, asked again while it is busy.

Nothing is asked of a network unless an address is given, and a key goes into the request's header
and nowhere else: errors quote what the endpoint said without it.
"""

import dataclasses
import email.utils
import time
from collections.abc import Sequence
from datetime import UTC, datetime

import httpx

from sae_ray.chat import Message
from sae_ray.errors import EndpointError

BUSY = (408, 409, 429, 500, 502, 503, 504, 529)
"""Answers after which the same request may succeed a little later."""
_LONGEST_WAIT_S = 60.0
"""Before any repetition, whatever the endpoint says."""
_FORBIDDEN = (401, 403)
_SHOWN_CHARS = 200


class NoAnswerError(EndpointError):
    """It stayed busy or silent, however often one request was repeated; others may do better."""


@dataclasses.dataclass(frozen=True, slots=True)
class Reply:
    """What a model said."""

    text: str
    prompt_tokens: int | None
    """As the endpoint counts them, if it says."""
    reply_tokens: int | None


class ChatEndpoint:
    """One model at one address; may be used from several threads at once."""

    def __init__(
        self,
        url: str,
        model: str,
        api_key: str | None = None,
        *,
        timeout_s: float = 120.0,
        num_tries: int = 5,
        wait_s: float = 1.0,
    ) -> None:
        """Check the address; nothing is asked yet.

        Args:
            url: the endpoint up to and with its version: `https://host/v1`.
            model: one that it serves.
            api_key: its key, if it wants one.
            timeout_s: longest wait for one answer.
            num_tries: times that one request is put.
            wait_s: before the first repetition, where it does not say how long; then twice that.
        """
        self.model, self._key = model, api_key
        self._url = _completions_url(url)
        self._num_tries, self._wait_s = num_tries, wait_s
        self._client = httpx.Client(headers=_header(api_key), timeout=timeout_s)
        self._timeout_s = timeout_s

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def ask(
        self, messages: Sequence[Message], *, temperature: float = 0.0, max_tokens: int = 512
    ) -> Reply:
        """Return what the model says next.

        Raises:
            NoAnswerError: not after all repetitions.
            EndpointError: it refuses, and will again.
        """
        body = {
            "model": self.model,
            "messages": list(messages),
            "temperature": temperature,
            "max_tokens": max_tokens,
        }
        trouble = ""
        for attempt in range(self._num_tries):
            reply, trouble = self._post(body)
            if reply is not None and reply.status_code not in BUSY:
                return self._read(reply)
            if attempt + 1 < self._num_tries:
                time.sleep(self._wait(attempt, reply))
        raise NoAnswerError(
            f"the endpoint {self._url} gave no answer after {self._num_tries} tries ({trouble}): "
            "try again later, ask less at once, or take a faster model"
        )

    def _post(self, body: dict) -> tuple[httpx.Response | None, str]:
        try:
            reply = self._client.post(self._url, json=body)
            return reply, f"{reply.status_code} {reply.reason_phrase}: {self._excerpt(reply.text)}"
        except httpx.TimeoutException:
            return None, f"nothing for {self._timeout_s:g} s"
        except httpx.HTTPError as error:
            return None, str(error) or type(error).__name__

    def _wait(self, attempt: int, reply: httpx.Response | None) -> float:
        asked = _retry_after(reply.headers.get("retry-after", "")) if reply is not None else None
        wait = self._wait_s * 2**attempt if asked is None else asked
        return min(wait, _LONGEST_WAIT_S)

    def _read(self, reply: httpx.Response) -> Reply:
        if reply.status_code != httpx.codes.OK:
            key = "; put its key in OPENAI_API_KEY" if reply.status_code in _FORBIDDEN else ""
            raise EndpointError(
                f"the endpoint {self._url} answered {reply.status_code} {reply.reason_phrase} "
                f"({self._excerpt(reply.text)}): an OpenAI-compatible URL and a model that it "
                f"serves are needed{key}"
            )
        try:
            answer = reply.json()
            text = answer["choices"][0]["message"]["content"]
            usage = answer.get("usage") or {}
            counts = (usage.get("prompt_tokens"), usage.get("completion_tokens"))
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise EndpointError(
                f"the endpoint {self._url} answered {self._excerpt(reply.text)}, which is no chat "
                "completion: an OpenAI-compatible URL is needed, often one that ends in /v1"
            ) from error
        # A model that only thought, or was cut off, says nothing: that is an answer too.
        return Reply(text if isinstance(text, str) else "", *counts)

    def _excerpt(self, text: str) -> str:
        return repr((text.replace(self._key, "[key]") if self._key else text)[:_SHOWN_CHARS])


def _completions_url(base_url: str) -> httpx.URL:
    try:
        url = httpx.URL(f"{base_url.rstrip('/')}/chat/completions")
    except httpx.InvalidURL as error:
        raise EndpointError(
            f"the endpoint {base_url!r} is no URL ({error}): give https://..."
        ) from (error)
    if url.scheme not in ("http", "https") or not url.host:
        raise EndpointError(
            f"the endpoint {base_url!r} is not on the web: give https://... or http://..."
        )
    if url.userinfo or url.query:
        raise EndpointError(
            f"the endpoint's URL on {url.host} holds a password or a query, and URLs are written "
            "to the manifest: give the plain address, and its key in OPENAI_API_KEY"
        )
    return url


def _header(api_key: str | None) -> dict[str, str]:
    if not api_key:
        return {}
    if not (api_key.isascii() and api_key.isprintable()):
        raise EndpointError(
            "OPENAI_API_KEY holds a line break or a character that no key has: set it again"
        )
    return {"Authorization": f"Bearer {api_key}"}


def _retry_after(header: str) -> float | None:
    """Read a wait in seconds from a header that holds seconds or a date; None if it is neither."""
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        at = email.utils.parsedate_to_datetime(header)
    except ValueError:
        return None
    at = at if at.tzinfo else at.replace(tzinfo=UTC)
    return max(0.0, (at - datetime.now(UTC)).total_seconds())
