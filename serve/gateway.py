"""Gateway: from a request to who answers it, and from what can go wrong to what is told of it."""

import asyncio
import contextlib
import dataclasses
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from typing import TypeVar
from urllib.parse import quote

from pydantic import JsonValue
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException

from sae_ray.chat import Message
from sae_ray.errors import BusyError, RequestError, SaeRayError, WorkError
from sae_ray.experts.answers import Piece, Sampling
from sae_ray.experts.prototypes import ReadToken
from sae_ray.experts.router import Route
from serve.meters import Meters
from serve.schemas import BASE, MIXTURE, ApiError, RouteOptions

logger = logging.getLogger(__name__)

LOST = (RayActorError, RayServeException, WorkError)
"""What is raised where a replica is gone, or not yet there, or its engine has stopped."""
_AGAIN_AFTER_S = (0.0, 1.0, 5.0)
"""Seconds before each time that another replica is asked; the last outlast a health check. No more
often: a request that ends whoever answers it must not end them all."""
_EXPERTS_FOR_S = 1.0
_RETRY_AFTER_S = 1


@dataclasses.dataclass(frozen=True)
class Question:
    """What an engine is asked: messages, plain text or tokens, and by whom to answer them."""

    prompt: str | list[Message] | list[int]
    experts: tuple[str, ...]
    weights: tuple[float, ...]
    sampling: Sampling


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer, or part of it."""

    prompt_tokens: int
    pieces: list[Piece]

    @property
    def num_tokens(self) -> int:
        """Return how many tokens it has."""
        return sum(piece.num_tokens for piece in self.pieces)

    @property
    def text(self) -> str:
        """Return what it says."""
        return "".join(piece.text for piece in self.pieces)


@dataclasses.dataclass(frozen=True)
class Backends:
    """The engine and the router, in this process or as deployments."""

    experts: Callable[[], Awaitable[dict[str, str]]]
    """Ids of the experts that can be asked, by name."""
    answer: Callable[[Question], Awaitable[Answer]]
    stream: Callable[[Question], AsyncGenerator[Answer, None]]
    """Part after part of it."""
    route: Callable[[list[Message], str | None, int], Awaitable[Route]] | None
    """None where there is no router: then nobody can ask the mixture."""
    read: Callable[[list[Message], list[int]], Awaitable[list[ReadToken]]] | None
    """The last request's tokens with some latents; None where there is no router."""


@dataclasses.dataclass(frozen=True)
class Chosen:
    """Who answers a request, and why."""

    experts: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    names: tuple[str, ...] = ()
    route: Route | None = None
    """Set where a router chose."""
    known: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Names of all experts that can be asked, by id."""
    tokens: Sequence[ReadToken] | None = None
    """Of the last request, with the latents of the reasons; None where nobody asked for them."""

    @property
    def header(self) -> str:
        """Return who answers, for a header."""
        return ",".join(quote(name) for name in self.names) or BASE

    @property
    def told(self) -> dict[str, JsonValue]:
        """Return the decision for a response."""
        experts: list[JsonValue] = [
            {"id": id, "name": name, "weight": weight}
            for id, name, weight in zip(self.experts, self.names, self.weights, strict=True)
        ]
        route = self.route
        if route is None:
            return {"experts": experts, "chosen_by": "client"}
        return {
            "experts": experts,
            "chosen_by": "router",
            "abstained": not self.experts,
            "reasons": [
                {"latent": r.latent, "label": r.label, "contribution": r.contribution}
                for r in route.reasons
                if route.abstained or self.experts  # else they speak for somebody who is gone
            ],
            "scores": {
                BASE if one == BASE else self.known[one]: score
                for one, score in route.scores.items()
                if one == BASE or one in self.known
            },
            **self._told_tokens,
        }

    @property
    def _told_tokens(self) -> dict[str, JsonValue]:
        if self.tokens is None:
            return {}
        return {"tokens": [one.told for one in self.tokens]}


T = TypeVar("T")


class Gateway:
    """Chooses who answers, asks, asks again where a replica was lost, and counts."""

    def __init__(self, backends: Backends, meters: Meters, *, timeout_s: float) -> None:
        self._backends = backends
        self._meters = meters
        self.timeout_s = timeout_s
        self._known: tuple[float, dict[str, str]] = (float("-inf"), {})

    async def experts(self) -> dict[str, str]:
        """Return the ids of the experts that can be asked, by name."""
        asked_at, known = self._known
        if time.monotonic() - asked_at > _EXPERTS_FOR_S:
            known = await self._patiently(self._backends.experts)
            self._known = (time.monotonic(), known)
        return known

    async def models(self) -> list[str]:
        """Return who can be asked by name, the mixture first."""
        mixture = [] if self._backends.route is None else [MIXTURE]
        return [*mixture, BASE, *sorted(await self.experts())]

    async def choose(self, model: str, messages: list[Message], options: RouteOptions) -> Chosen:
        """Find who is to answer.

        Raises:
            ApiError: 404 where there is no such model.
        """
        if model == BASE:
            return Chosen()
        experts = await self.experts()
        if model == MIXTURE and self._backends.route is not None:
            return await self.route(messages, options)
        if model not in experts:
            names = ", ".join(await self.models())
            raise ApiError(
                404,
                f"there is no such model here: choose one of {names}",
                param="model",
                code="model_not_found",
            )
        return Chosen((experts[model],), (1.0,), (model,))

    async def route(self, messages: list[Message], options: RouteOptions) -> Chosen:
        """Let the router choose.

        Raises:
            ApiError: 404 where there is no router.
        """
        route = self._backends.route
        if route is None:
            raise ApiError(404, "there is no router here: name an expert, or base", param="model")
        started = time.perf_counter()
        made = await self._patiently(lambda: route(messages, options.previous, options.top_k))
        self._meters.observe("route", time.perf_counter() - started)
        names = {id: name for name, id in (await self.experts()).items()}
        # A router may not have heard yet of who was retired: the base answers in their place.
        present = {
            id: weight
            for id, weight in zip(made.expert_ids, made.weights, strict=True)
            if id in names
        }
        chosen = tuple(names[id] for id in present)
        weights = tuple(weight / sum(present.values()) for weight in present.values())
        self._meters.count_route(chosen, abstained=not chosen)
        return Chosen(tuple(present), weights, chosen, made, names)

    async def read(self, messages: list[Message], chosen: Chosen) -> Chosen:
        """Add to a decision what its reasons read at each token of the last request."""
        read, route = self._backends.read, chosen.route
        assert read is not None, "whoever routes can read"
        assert route is not None, "only a router has reasons"
        latents = [reason.latent for reason in route.reasons]
        tokens = await self._patiently(lambda: read(messages, latents))
        return dataclasses.replace(chosen, tokens=tokens)

    async def answer(self, question: Question) -> Answer:
        """Return a whole answer.

        Raises:
            ApiError: there is none, and why.
        """
        started = time.perf_counter()
        answer = await self._patiently(lambda: self._backends.answer(question))
        self._meters.observe("answer", time.perf_counter() - started)
        self._meters.count_tokens(answer.prompt_tokens, answer.num_tokens)
        return answer

    async def stream(self, question: Question) -> AsyncGenerator[Answer, None]:
        """Return an answer in parts, as it is made.

        Raises:
            ApiError: it cannot begin, or cannot go on.
        """
        started = time.perf_counter()
        num_tokens = prompt_tokens = 0
        async with contextlib.aclosing(self._parts(question)) as parts:
            async for part in parts:
                if not num_tokens:
                    self._meters.observe("first_token", time.perf_counter() - started)
                prompt_tokens = part.prompt_tokens
                num_tokens += part.num_tokens
                yield part
        self._meters.observe("answer", time.perf_counter() - started)
        self._meters.count_tokens(prompt_tokens, num_tokens)

    async def _parts(self, question: Question) -> AsyncGenerator[Answer, None]:
        """Begin on another replica where one is lost before it has said anything."""
        deadline = asyncio.get_running_loop().time() + self.timeout_s
        pauses, begun = iter(_AGAIN_AFTER_S), False
        while True:
            try:
                async with contextlib.aclosing(self._backends.stream(question)) as parts:
                    while True:
                        # No timeout lasts over a yield: who asks for more may be another task.
                        async with asyncio.timeout_at(deadline):
                            part = await anext(parts, None)
                        if part is None:
                            return
                        begun = True
                        yield part
            except BackPressureError as error:
                raise told(error, self.timeout_s) from error
            except LOST as error:
                if begun or (pause := next(pauses, None)) is None:
                    raise told(error, self.timeout_s) from error
                await self._pause(pause, error)
            except (TimeoutError, SaeRayError, RayTaskError) as error:
                raise told(error, self.timeout_s) from error

    async def _patiently(self, ask: Callable[[], Awaitable[T]]) -> T:
        """Ask, within the time there is, and again where a replica was lost."""
        pauses = iter(_AGAIN_AFTER_S)
        try:
            async with asyncio.timeout(self.timeout_s):
                while True:
                    try:
                        return await ask()
                    except BackPressureError:
                        raise
                    except LOST as error:
                        if (pause := next(pauses, None)) is None:
                            raise
                        await self._pause(pause, error)
        except (TimeoutError, SaeRayError, RayTaskError, *LOST) as error:
            raise told(error, self.timeout_s) from error

    async def _pause(self, seconds: float, error: BaseException) -> None:
        self._meters.count_retry()
        logger.warning("a replica was lost, another is asked: %s", type(error).__name__)
        await asyncio.sleep(seconds)


def told(error: BaseException, timeout_s: float) -> ApiError:
    """Return what is told of an error: nothing that is the server's own business."""
    if isinstance(error, RayTaskError) and isinstance(error.cause, BaseException):
        error = error.cause
    if isinstance(error, RequestError):
        return ApiError(400, str(error), param=error.param, code=error.code)
    if isinstance(error, BusyError | BackPressureError):
        message = str(error) if isinstance(error, BusyError) else "too many requests are waiting"
        return ApiError(
            429, f"{message.split(':')[0]}: ask again in a moment", retry_after_s=_RETRY_AFTER_S
        )
    if isinstance(error, TimeoutError):
        return ApiError(504, f"no answer within {timeout_s:g} s: ask for fewer tokens")
    # What an error says may hold paths, or what was asked.
    request = uuid.uuid4().hex[:12]
    logger.error("request %s failed: %s", request, type(error).__name__)
    logger.debug("request %s failed", request, exc_info=error)
    if isinstance(error, LOST):
        return ApiError(
            503, "the replica that answered is gone: ask again", retry_after_s=_RETRY_AFTER_S
        )
    if isinstance(error, SaeRayError):
        message = f"this expert cannot answer now (request {request}): ask another model"
        return ApiError(503, message, retry_after_s=30)
    return ApiError(500, f"this is the server's mistake, and was logged (request {request})")
