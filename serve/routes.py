"""Routes: OpenAI's HTTP API over a gateway, errors as OpenAI tells them, and the page."""

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fastapi import Depends, FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, JsonValue
from pydantic.json_schema import JsonSchemaMode, models_json_schema
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from sae_ray.chat import Message
from serve.forms import Form
from serve.gateway import Answer, Chosen, Gateway, Question
from serve.hosts import is_loopback
from serve.keys import Keys
from serve.meters import Meters
from serve.schemas import ApiError, BodyT, ChatRequest, CompletionRequest, RouteRequest, read_body

UI = Path(__file__).parent / "ui"
_PAGE = {
    "/": ("index.html", "text/html"),
    "/ui/page.js": ("page.js", "text/javascript"),
    "/ui/why.js": ("why.js", "text/javascript"),
    "/ui/page.css": ("page.css", "text/css"),
}
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
ROUTE_HEADER = "X-Moie-Route"
_DEFINED = "#/components/schemas/{model}"


@dataclasses.dataclass(frozen=True)
class HttpLimits:
    """What a request may take."""

    max_body_bytes: int = 1 << 20
    max_ongoing: int = 128
    """Requests in progress; those beyond are refused at once."""
    body_timeout_s: float = 20.0
    """Until all of a request has come."""


class Ingress:
    """What stands between HTTP and the gateway: keys, limits and the two forms of an answer."""

    def __init__(self, gateway: Gateway, keys: Keys, limits: HttpLimits, meters: Meters) -> None:
        self.gateway = gateway
        self.meters = meters
        self._keys = keys
        self._limits = limits
        self._ongoing = 0

    async def require_host(self, request: Request) -> None:
        """Refuse names of others, where no keys are asked for.

        Any web page may give its own name this machine's address (DNS rebinding), and then ask from
        a visitor's browser. starlette's TrustedHostMiddleware does the same, though in its own
        words and not for IPv6.
        """
        name = _hostname(request.headers.get("host", ""))
        if not self._keys.required and (name is None or not is_loopback(name)):
            raise ApiError(
                421,
                "this service is for its own machine, where it is called 127.0.0.1 or localhost: "
                "ask it by that name, or let it ask for keys",
            )

    def require_key(self, request: Request) -> None:
        """Refuse who has no key."""
        if not self._keys.admits(request.headers.get("authorization")):
            raise ApiError(
                401,
                "no key that is known here was given: send one as 'Authorization: Bearer KEY'",
                code="invalid_api_key",
            )

    def admitted(self, request: Request) -> contextlib.AsyncExitStack:
        """Let a request in that has a key, if there is a place; left with what is returned.

        The place is taken before the body is read and before anything is routed: what is too much
        costs nothing, and bodies that come slowly are no more than there are places.
        """
        self.require_key(request)
        held = contextlib.AsyncExitStack()
        held.enter_context(self._place())
        return held

    async def read(self, request: Request, model: type[BodyT]) -> BodyT:
        """Read a request's body, no larger and no slower than allowed."""
        # Of other kinds web pages may send to any address without asking first.
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, "the body must be JSON: send 'Content-Type: application/json'")
        most = self._limits.max_body_bytes
        too_large = ApiError(413, f"the body is larger than {most:,} bytes: send less")
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > most:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(self._limits.body_timeout_s):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > most:
                        raise too_large
        except TimeoutError:
            raise ApiError(408, "the body did not come in time: send it again") from None
        return read_body(model, bytes(body))

    @contextlib.contextmanager
    def _place(self) -> Iterator[None]:
        """Hold a place among the requests in progress."""
        if self._ongoing >= self._limits.max_ongoing:
            raise ApiError(
                429, "too many requests are in progress: ask again in a moment", retry_after_s=1
            )
        self._ongoing += 1
        try:
            yield
        finally:
            self._ongoing -= 1

    async def respond(
        self,
        question: Question,
        chosen: Chosen,
        form: Form,
        asked: Any,
        held: contextlib.AsyncExitStack,
    ) -> Response:
        """Answer at once or in a stream; what goes wrong before its first byte is an error.

        A stream takes over what is held for the request, and lets go of it when it ends.
        """
        headers = {ROUTE_HEADER: chosen.header}
        if not asked.stream:
            answer = await self.gateway.answer(question)
            return JSONResponse(form.whole(answer), headers=headers)
        parts = self.gateway.stream(question)
        held.push_async_callback(parts.aclose)
        first = await anext(parts)
        with_usage = asked.stream_options is not None and asked.stream_options.include_usage
        events = self._events(form, first, parts, with_usage=with_usage)
        held.push_async_callback(events.aclose)
        return HeldResponse(events, held.pop_all(), headers)

    async def _events(
        self, form: Form, first: Answer, parts: AsyncIterator[Answer], *, with_usage: bool
    ) -> AsyncGenerator[str, None]:
        """Write server-sent events; a stream that breaks ends with an error event."""
        num_tokens = first.num_tokens
        try:
            yield _event(form.chunk(first.pieces, opening=True))
            async for part in parts:
                num_tokens += part.num_tokens
                yield _event(form.chunk(part.pieces))
            if with_usage:
                yield _event(form.usage_chunk(first.prompt_tokens, num_tokens))
            yield "data: [DONE]\n\n"
        except ApiError as error:
            self.meters.count_refusal(error.status)
            yield _event(error.body)


class HeldResponse(StreamingResponse):
    """A stream that lets go of what it holds also where nobody is there to begin it for."""

    def __init__(
        self,
        events: AsyncGenerator[str, None],
        held: contextlib.AsyncExitStack,
        headers: dict[str, str],
    ) -> None:
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        async with self._held:
            await super().__call__(scope, receive, send)


def _hostname(host: str) -> str | None:
    """Return the name in a Host header; None where there is none."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def _event(body: dict[str, JsonValue]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def create_app(ingress: Ingress) -> FastAPI:
    """Lay out the HTTP API.

    Without a key one gets the page, the health checks and /openapi.json, which says what the source
    says: they tell nothing of who is served, and asking costs no engine anything.
    """
    known_host = [Depends(ingress.require_host)]
    app = FastAPI(title="sae-ray", docs_url=None, redoc_url=None, dependencies=known_host)
    gateway = ingress.gateway

    @app.post("/v1/chat/completions", openapi_extra=_body(ChatRequest))
    async def chat(request: Request) -> Response:
        async with ingress.admitted(request) as held:
            asked = await ingress.read(request, ChatRequest)
            sampling = asked.sampling
            chosen = await gateway.choose(asked.model, asked.plain, asked.moie)
            question = Question(asked.plain, chosen.experts, chosen.weights, sampling)
            form = Form(asked.model, chosen, chat=True)
            return await ingress.respond(question, chosen, form, asked, held)

    @app.post("/v1/completions", openapi_extra=_body(CompletionRequest))
    async def complete(request: Request) -> Response:
        async with ingress.admitted(request) as held:
            asked = await ingress.read(request, CompletionRequest)
            sampling, prompt = asked.sampling, asked.one_prompt
            text = prompt if isinstance(prompt, str) else ""
            messages: list[Message] = [{"role": "user", "content": text}]
            chosen = await gateway.choose(asked.model, messages, asked.moie)
            question = Question(prompt, chosen.experts, chosen.weights, sampling)
            form = Form(asked.model, chosen, chat=False)
            return await ingress.respond(question, chosen, form, asked, held)

    @app.post("/v1/route", openapi_extra=_body(RouteRequest))
    async def route(request: Request) -> Response:
        async with ingress.admitted(request):
            asked = await ingress.read(request, RouteRequest)
            chosen = await gateway.route(asked.plain, asked.moie)
            if asked.tokens:
                chosen = await gateway.read(asked.plain, chosen)
        return JSONResponse(
            {"object": "route", **chosen.told}, headers={ROUTE_HEADER: chosen.header}
        )

    _add_lookups(app, ingress)
    for path, (name, kind) in _PAGE.items():
        app.add_api_route(path, _file(UI / name, kind), include_in_schema=False)
    _define_bodies(app)
    _tell_errors(app, ingress.meters)
    return app


def _add_lookups(app: FastAPI, ingress: Ingress) -> None:
    """Say who can be asked, and whether anybody can."""
    gateway = ingress.gateway

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        ingress.require_key(request)
        data = [_model(name) for name in await gateway.models()]
        return JSONResponse({"object": "list", "data": data})

    @app.get("/v1/models/{name}")
    async def model(request: Request, name: str) -> Response:
        ingress.require_key(request)
        if name not in await gateway.models():
            raise ApiError(
                404, "there is no such model here", param="model", code="model_not_found"
            )
        return JSONResponse(_model(name))

    @app.get("/healthz")
    async def healthz() -> Response:
        return JSONResponse({"status": "ok"})

    @app.get("/readyz")
    async def readyz() -> Response:
        await gateway.experts()
        return JSONResponse({"status": "ready"})


def _model(name: str) -> dict[str, JsonValue]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "sae-ray"}


def _file(path: Path, kind: str) -> Callable[[], Response]:
    def serve_file() -> Response:
        return FileResponse(path, media_type=kind, headers=_PAGE_HEADERS)

    return serve_file


def _body(model: type[BodyT]) -> dict[str, Any]:
    schema = {"$ref": _DEFINED.format(model=model.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _define_bodies(app: FastAPI) -> None:
    """Let the OpenAPI document define the bodies that it refers to, which FastAPI does not read."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        document = plain()
        mode: JsonSchemaMode = "validation"
        known: list[tuple[type[BaseModel], JsonSchemaMode]] = [
            (one, mode) for one in (ChatRequest, CompletionRequest, RouteRequest)
        ]
        _, defined = models_json_schema(known, ref_template=_DEFINED)
        document.setdefault("components", {}).setdefault("schemas", {}).update(defined["$defs"])
        return document

    app.openapi = openapi


def _tell_errors(app: FastAPI, meters: Meters) -> None:
    """Let every error be told as OpenAI tells it."""

    async def tell(_request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        meters.count_refusal(error.status)
        return JSONResponse(error.body, error.status, headers=error.headers)

    async def tell_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        said = {404: "there is nothing at this address", 405: "this address takes another method"}
        message = said.get(error.status_code, "this is no request that can be read")
        return await tell(request, ApiError(error.status_code, message))

    async def tell_mistake(request: Request, _error: Exception) -> Response:
        return await tell(request, ApiError(500, "this is the server's mistake, and was logged"))

    app.add_exception_handler(ApiError, tell)
    app.add_exception_handler(HTTPException, tell_http)
    app.add_exception_handler(Exception, tell_mistake)
