"""Deployments: engine, router and ingress as plain classes, which Ray Serve makes replicas of."""

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from sae_ray.chat import Message
from sae_ray.errors import ModelError, RequestError, SaeRayError, WorkError
from sae_ray.experts.answers import Ask, Finish, Limits, Piece, Ticket
from sae_ray.experts.engine import Engine
from sae_ray.experts.following import Follower
from sae_ray.experts.prototypes import ReadToken, requests, tokens_of
from sae_ray.experts.registry import ExpertRegistry
from sae_ray.experts.router import Route, Router
from sae_ray.lm import DTypeName
from sae_ray.storage import storage_errors
from sae_ray.threads import use_cores
from serve.gateway import Answer, Backends, Gateway, Question
from serve.keys import Keys
from serve.meters import EngineMeters, Meters
from serve.routes import HttpLimits, Ingress, create_app

logger = logging.getLogger(__name__)

_STUCK_AFTER_S = 120
"""Of a single step: whoever waits for it has been told by then that there is no answer."""


class EngineReplica:
    """An engine with a thread that steps it, asked by coroutines."""

    def __init__(
        self,
        lm: str | None,
        registry: str | None,
        limits: dict[str, float],
        dtype: DTypeName,
        device: str,
        reload_s: float,
        num_cpus: int | None,
    ) -> None:
        use_cores(num_cpus)
        self._engine = Engine(
            lm,
            registry,
            limits=Limits(**limits),  # pyright: ignore[reportArgumentType]
            dtype=dtype,
            device=device,
        )
        self._reload_s = reload_s
        self._meters = EngineMeters()
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._engine.run, args=(self._stop,), daemon=True),
            threading.Thread(target=self._look_round, daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    async def experts(self) -> dict[str, str]:
        """Return the ids of the experts that can be asked, by name."""
        return {name: expert.id for name, expert in self._engine.experts.items()}

    async def answer(self, question: Question) -> Answer:
        """Return a whole answer."""
        prompt_tokens, pieces = 0, list[Piece]()
        async with contextlib.aclosing(self._parts(question, whole=True)) as parts:
            async for part in parts:
                prompt_tokens = part.prompt_tokens
                pieces += part.pieces
        return Answer(prompt_tokens, pieces)

    async def stream(self, question: Question) -> AsyncGenerator[Answer, None]:
        """Return an answer in parts; it is cancelled where nobody takes them any more."""
        async with contextlib.aclosing(self._parts(question, whole=False)) as parts:
            async for part in parts:
                yield part

    async def _parts(self, question: Question, *, whole: bool) -> AsyncGenerator[Answer, None]:
        """Return an answer in parts, or as one part."""
        loop, ready = asyncio.get_running_loop(), asyncio.Event()
        pieces: queue.SimpleQueue[Piece] = queue.SimpleQueue()

        # Either the thread sees that who asked has gone, or who goes sees the ticket.
        gone, begun = threading.Event(), list[Ticket]()

        def hand_over(piece: Piece) -> None:
            pieces.put(piece)
            if piece.finish is None and (whole or ready.is_set()):
                return  # each wake-up of the loop takes time from the engine
            # Whoever asked may have gone, and the loop with it: the engine goes on with the others.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(ready.set)

        def submit() -> Ticket:
            begun.append(ticket := self._submit(question, hand_over))
            if gone.is_set():
                ticket.cancel()
            return ticket

        try:
            # In a thread, which no cancellation stops: it may have to fetch an expert first.
            ticket = await asyncio.to_thread(submit)
            finish = None
            while finish is None:
                await ready.wait()
                ready.clear()
                part = [pieces.get() for _ in range(pieces.qsize())]
                if part:
                    finish = part[-1].finish
                    _require_whole(finish)
                    yield Answer(len(ticket.ask.ids), part)
        finally:
            gone.set()
            for ticket in begun:
                ticket.cancel()

    def _submit(self, question: Question, hand_over: Any) -> Ticket:
        match question.prompt:
            case str() as text:
                ids = self._engine.prompts.of_text(text)
            case [int(), *_] as given:
                ids = self._engine.prompts.of_tokens(given)  # pyright: ignore[reportArgumentType]
            case messages:
                ids = self._engine.prompts.of_messages(messages)  # pyright: ignore[reportArgumentType]
        ask = Ask(ids, question.experts, question.weights, question.sampling)
        return self._engine.submit(ask, hand_over)

    def _look_round(self) -> None:
        """Look into the registry now and then, and show what the engine is busy with."""
        while not self._stop.wait(self._reload_s):
            with _warned("the registry cannot be read: the experts stay as they are"):
                self._engine.refresh()
            self._meters.show(self._engine.load)

    def check_health(self) -> None:
        """Let Serve replace a replica whose engine does not step any more."""
        stuck = time.monotonic() - self._engine.stepped_at > _STUCK_AFTER_S
        if stuck or not all(thread.is_alive() for thread in self._threads):
            raise WorkError("the engine has stopped: see the replica's log; Serve starts another")

    def close(self) -> None:
        """Stop stepping; whoever waits is told so."""
        self._stop.set()
        for thread in self._threads:
            thread.join()


def _require_whole(finish: Finish | None) -> None:
    """Refuse an answer that its engine has given up."""
    if finish == "cancelled":
        raise WorkError("the engine stopped before the answer was whole: ask another one")
    if finish == "failed":
        raise ModelError("the model cannot be run on this request: ask another expert")


class RouterReplica:
    """A router with a thread that keeps it as the registry is, asked by coroutines."""

    def __init__(
        self,
        path: str,
        lm: str | None,
        sae: str | None,
        registry: str,
        reload_s: float,
        num_cpus: int | None,
    ) -> None:
        use_cores(num_cpus)
        self._follower = Follower(Router.load(path, lm, sae), ExpertRegistry(registry))
        self._follower.look()
        self._reload_s = reload_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look_round, daemon=True)
        self._thread.start()

    async def route(self, messages: list[Message], previous: str | None, top_k: int) -> Route:
        """Decide who is to answer.

        Raises:
            RequestError: more experts are to answer than there are.
        """
        router = self._follower.router
        if top_k > (most := len(router.experts)):
            raise RequestError(
                f"top_k={top_k} but {most} experts can be chosen from: give 1 to {most}",
                param="moie.top_k",
            )
        return await asyncio.to_thread(router.route, messages, previous=previous, top_k=top_k)

    async def read(self, messages: list[Message], latents: list[int]) -> list[ReadToken]:
        """Return the last request's tokens, each with those of these latents that are on there."""
        last = "".join(requests(messages)[-1:])
        trace = await asyncio.to_thread(self._follower.router.eyes.trace, last, latents)
        return tokens_of(trace, latents)

    def _look_round(self) -> None:
        """Look into the registry now and then."""
        while not self._stop.wait(self._reload_s):
            with _warned("the registry cannot be read: routes stay as they are"):
                self._follower.look()

    def check_health(self) -> None:
        """Let Serve replace a replica that does not follow the registry any more."""
        if not self._thread.is_alive():
            raise WorkError("the router does not follow the registry: see its log")

    def close(self) -> None:
        """Follow no longer."""
        self._stop.set()
        self._thread.join()


@contextlib.contextmanager
def _warned(what: str) -> Iterator[None]:
    """Go on after what may pass, such as storage that is away for a while, and say so."""
    try:
        yield
    except (SaeRayError, *storage_errors()) as error:
        logger.warning("%s (%s)", what, error)


@serve.ingress()
class IngressReplica:
    """The HTTP API before the handles of engine and router."""

    def __init__(
        self,
        engine: DeploymentHandle,
        router: DeploymentHandle | None,
        keys: str | None,
        timeout_s: float,
        http: dict[str, float],
    ) -> None:
        meters = Meters()
        gateway = Gateway(backends_of(engine, router), meters, timeout_s=timeout_s)
        limits = HttpLimits(**http)  # pyright: ignore[reportArgumentType]
        self._ingress = Ingress(gateway, Keys(keys), limits, meters)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self._ingress)


def backends_of(engine: DeploymentHandle, router: DeploymentHandle | None) -> Backends:
    """Reach engine and router through Serve's handles."""
    streaming = engine.options(stream=True)

    async def asked(handle: Any, *arguments: Any) -> Any:
        response = handle.remote(*arguments)
        try:
            return await response
        except asyncio.CancelledError:
            response.cancel()
            raise

    async def streamed(question: Question) -> AsyncGenerator[Answer, None]:
        response = streaming.stream.remote(question)
        try:
            async for part in response:  # pyright: ignore
                yield part
        finally:
            response.cancel()

    async def routed(messages: list[Message], previous: str | None, top_k: int) -> Route:
        assert router is not None
        return await asked(router.route, messages, previous, top_k)

    async def read(messages: list[Message], latents: list[int]) -> list[ReadToken]:
        assert router is not None
        return await asked(router.read, messages, latents)

    return Backends(
        experts=lambda: asked(engine.experts),
        answer=lambda question: asked(engine.answer, question),
        stream=streamed,
        route=None if router is None else routed,
        read=None if router is None else read,
    )
