"""Schemas: OpenAI's requests as far as they are served, refusals of the rest, and error objects.

What a field would change and cannot is refused, never ignored; a field that OpenAI does not know is
refused as OpenAI does. Fields that change nothing here (`user`, `metadata`, ...) are taken.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from sae_ray.chat import Message
from sae_ray.experts.answers import Sampling

MIXTURE, BASE = "moie", "base"
"""Models that are no expert: who answers is chosen by the prompt, or nobody but the base does."""

Role = Literal["system", "developer", "user", "assistant"]
_LARGEST_SEED = 2**63


class ApiError(Exception):
    """What is sent back as OpenAI's error object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    @property
    def body(self) -> dict[str, JsonValue]:
        """Return the error object."""
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = kinds.get(self.status, kind)
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    @property
    def headers(self) -> dict[str, str]:
        """Return what is said beside it: when to ask again."""
        return {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}


class _Strict(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class TextPart(_Strict):
    """Part of a message's content."""

    type: Literal["text"]
    text: str


Nothing = Annotated[list[JsonValue], Field(max_length=0)] | None
"""What OpenAI's client sends back with an answer's message, though there is nothing in it."""


class ChatMessage(_Strict):
    """One turn; an answer's message can be sent back as it came."""

    role: Role
    content: str | list[TextPart]
    name: str | None = None
    refusal: Literal[""] | None = None
    annotations: Nothing = None
    tool_calls: Nothing = None
    function_call: None = None
    audio: None = None

    @property
    def plain(self) -> Message:
        """Return it as chat templates take it."""
        content = self.content
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class RouteOptions(_Strict):
    """How the mixture is to route."""

    previous: str | None = None
    """Id of the expert that answered the turn before: it stays unless another is clearly better."""
    top_k: int = Field(default=1, ge=1, le=8)
    """How many experts may answer together, their logits averaged."""


class StreamOptions(_Strict):
    """What a stream says beside the answer."""

    include_usage: bool = False
    include_obfuscation: bool = False


class _Common(_Strict):
    model: str = Field(max_length=256)
    """moie, base, or an expert's name."""
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    max_tokens: int | None = Field(default=None, ge=1)
    seed: int | None = Field(default=None, ge=-_LARGEST_SEED, lt=_LARGEST_SEED)
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    moie: RouteOptions = RouteOptions()
    """Of this service alone: how the mixture routes."""

    n: Literal[1] | None = None
    presence_penalty: float | None = Field(default=None, ge=0, le=0)
    frequency_penalty: float | None = Field(default=None, ge=0, le=0)
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    user: str | None = None
    prompt_cache_key: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """Return the stop strings."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(given) > 4 or not all(given):
            raise ApiError(
                400, f"stop: {len(given)} strings were given; give 1 to 4, none empty", param="stop"
            )
        return tuple(given)

    def sampled(self, max_tokens: int | None, top_logprobs: int | None) -> Sampling:
        """Return how tokens are to be chosen."""
        return Sampling(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=self.seed,
            stop=self.stops,
            top_logprobs=top_logprobs,
        )


class TextFormat(_Strict):
    """The one form of answers."""

    type: Literal["text"]


class ChatRequest(_Common):
    """Body of POST /v1/chat/completions; what is not served may be there as null."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=2048)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    response_format: TextFormat | None = None
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None

    tools: None = None
    tool_choice: None = None
    functions: None = None
    function_call: None = None
    parallel_tool_calls: None = None
    audio: None = None
    prediction: None = None
    reasoning_effort: None = None
    verbosity: None = None
    web_search_options: None = None

    @property
    def sampling(self) -> Sampling:
        """Return how tokens are to be chosen."""
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs=true: give both", param="top_logprobs")
        top = (self.top_logprobs or 0) if self.logprobs else None
        return self.sampled(self.max_completion_tokens or self.max_tokens, top)

    @property
    def plain(self) -> list[Message]:
        """Return the messages as chat templates take them."""
        return [message.plain for message in self.messages]


class CompletionRequest(_Common):
    """Body of POST /v1/completions."""

    prompt: str | list[str] | list[int]
    logprobs: int | None = Field(default=None, ge=0, le=5)
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None

    @property
    def sampling(self) -> Sampling:
        """Return how tokens are to be chosen: 16 of them unless said otherwise, as OpenAI does."""
        return self.sampled(self.max_tokens or 16, self.logprobs)

    @property
    def one_prompt(self) -> str | list[int]:
        """Return the prompt, which must be one."""
        of_tokens = isinstance(self.prompt, list) and isinstance(next(iter(self.prompt), ""), int)
        if self.model == MIXTURE and of_tokens:
            raise ApiError(
                400,
                f"prompt: {MIXTURE} chooses by text: give text, or name who is to answer",
                param="prompt",
            )
        match self.prompt:
            case str() | [int(), *_]:
                return self.prompt  # pyright: ignore[reportReturnType]
            case [str() as text]:
                return text
        raise ApiError(
            400,
            f"prompt: {len(self.prompt)} prompts were given; give one, and ask once for each",
            param="prompt",
        )


class RouteRequest(_Strict):
    """Body of POST /v1/route."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=2048)
    moie: RouteOptions = RouteOptions()
    tokens: bool = False
    """Whether to add the last request's tokens, each with what the reasons' latents read there."""

    @property
    def plain(self) -> list[Message]:
        """Return the messages as routers take them."""
        return [message.plain for message in self.messages]


_TOOLS = ("tools", "tool_choice", "functions", "function_call", "parallel_tool_calls")
_REFUSED = {
    **dict.fromkeys(_TOOLS, "tool calls are not served: ask without them"),
    "response_format": "answers are plain text: leave response_format out, or give type text",
    "modalities": "answers are plain text: leave modalities out",
    "verbosity": "answers are as long as the model makes them: leave verbosity out",
    "audio": "answers are plain text: leave audio out",
    "reasoning_effort": "the model does not reason apart: leave reasoning_effort out",
    "web_search_options": "there is no search: leave web_search_options out",
    "prediction": "predicted outputs are not served: leave prediction out",
}

BodyT = TypeVar("BodyT", bound=_Strict)


def read_body(model: type[BodyT], body: bytes) -> BodyT:
    """Read a request's body.

    Raises:
        ApiError: 400, naming the field, and never repeating what was given.
    """
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        details = error.errors(include_url=False, include_context=True, include_input=True)
        raise _refusal(details) from None


def _refusal(details: list[Any]) -> ApiError:
    """Say what is wrong with a body, as far as one field."""
    by_field = {str(detail["loc"][0]): detail for detail in reversed(details) if detail["loc"]}
    if known := next((name for name in _REFUSED if name in by_field), None):
        return ApiError(400, _REFUSED[known], param=known, code="unsupported_parameter")
    if not by_field:
        return ApiError(400, f"the body is no JSON object that can be read ({_why(details[0])})")
    # A missing or wrong field says more than what is wrong with one alternative of its type.
    detail = next(iter(by_field.values()))
    if detail["type"] == "extra_forbidden" and len(detail["loc"]) == 1:
        name = str(detail["loc"][0])[:64]
        return ApiError(
            400, f"Unrecognized request argument supplied: {name}", code="unknown_parameter"
        )
    if detail["loc"][0] == "messages":
        return _refused_message(details)
    where = ".".join(str(part) for part in detail["loc"] if not _is_alternative(part))
    return ApiError(400, f"{where}: {_why(detail)}", param=where)


def _refused_message(details: list[Any]) -> ApiError:
    """Say what is wrong with a message: images, sound, files and tools first."""
    for detail in details:
        kind = detail["input"] if detail["loc"][-1] == "type" else None
        if isinstance(kind, str) and "content" in detail["loc"]:
            return ApiError(
                400,
                "only text is read, and a message has a part of another kind: leave out images, "
                "sound and files",
                param="messages",
                code="unsupported_content",
            )
        if detail["loc"][-1] in ("tool_calls", "function_call", "tool_call_id"):
            return ApiError(400, _REFUSED["tools"], param="messages", code="unsupported_parameter")
        if detail["loc"][-1] == "role" and detail["input"] in ("tool", "function"):
            return ApiError(400, _REFUSED["tools"], param="messages", code="unsupported_parameter")
    first = details[0]
    where = ".".join(str(part) for part in first["loc"] if not _is_alternative(part))
    return ApiError(400, f"{where}: {_why(first)}", param=where)


def _is_alternative(part: str | int) -> bool:
    """Say whether part of a place is pydantic's name of one alternative of a union."""
    return isinstance(part, str) and (part in ("str", "int") or "[" in part)


def _why(detail: Mapping[str, Any]) -> str:
    message = str(detail["msg"]).split(":", 1)[0] if detail["type"] == "json_invalid" else None
    return message or str(detail["msg"])
