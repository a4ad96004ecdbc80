"""Stepwise: a trainer that runs its own loop, turned into a generator of what happens in it.

The trainer runs in a thread of its own and waits whenever something has happened until the next
thing is asked for. At no time do both run, so whoever iterates may use the model in between.
"""

import threading
from collections.abc import Callable, Generator
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

import torch

Event = TypeVar("Event")


class Stopped(Exception):
    """Raised in the trainer's thread when nobody iterates any more."""


class Stepwise(Generic[Event]):
    """A call of `run(happened)`, which calls `happened` with each of its events."""

    def __init__(self, run: Callable[[Callable[[Event], None]], Any]) -> None:
        self._run = run
        self._events: SimpleQueue[tuple[str, Any]] = SimpleQueue()
        self._asked = threading.Semaphore(0)
        self._closed = False
        # CUDA's current device belongs to a thread.
        self._device = torch.cuda.current_device() if torch.cuda.is_available() else None

    def events(self) -> Generator[Event, None, None]:
        """Start the run and yield what happens in it; closing this stops it at its next event."""
        thread = threading.Thread(target=self._work, daemon=True)
        thread.start()
        try:
            while True:
                self._asked.release()
                kind, value = self._events.get()
                if kind == "done":
                    return
                if kind == "failed":
                    raise value
                yield value
        finally:
            self._closed = True
            self._asked.release()
            thread.join()

    def _work(self) -> None:
        if self._device is not None:
            torch.cuda.set_device(self._device)
        self._asked.acquire()
        try:
            self._run(self._happened)
        except Stopped:
            self._events.put(("done", None))
        except BaseException as error:  # noqa: BLE001 - handed to whoever iterates
            self._events.put(("failed", error))
        else:
            self._events.put(("done", None))

    def _happened(self, event: Event) -> None:
        self._events.put(("event", event))
        self._asked.acquire()
        if self._closed:
            raise Stopped
