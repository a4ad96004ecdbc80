"""A progress line for long work: a bar on a terminal, a logged line now and then elsewhere."""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Iterable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

logger = logging.getLogger(__name__)

_LOG_EVERY_S = 15


@dataclasses.dataclass(frozen=True)
class IndexProgress:
    """How far an index is."""

    shards: int
    num_shards: int
    rows: int
    tokens: int
    rejected: int


Report = Callable[[str, int, int, str], None]
"""Takes what is being done, how much of it, of how much, and what else there is to say."""


def follow(steps: Iterable[tuple[str, int, int, str]]) -> None:
    """Run a work to its end, showing how far each stage is; a step is what a `Report` takes."""
    with _bar("") as report:
        for one in steps:
            report(*one)


def watch(steps: Iterator[IndexProgress]) -> IndexProgress | None:
    """Run an index to its end, showing how far it is; return the last step."""
    last: IndexProgress | None = None
    started = time.monotonic()
    with _bar("shards") as report:
        for last in steps:
            speed = last.tokens / (time.monotonic() - started)
            detail = f"{last.rows:,} rows, {speed:,.0f} tokens/s"
            report("indexing", last.shards, last.num_shards, detail)
    return last


@contextlib.contextmanager
def _bar(unit: str) -> Iterator[Report]:
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(f"{unit}  {{task.fields[detail]}}"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )
    task, logged = bar.add_task("", total=None, detail="starting"), time.monotonic()

    def report(what: str, done: int, total: int, detail: str) -> None:
        nonlocal logged
        bar.update(task, description=what, total=total, completed=done, detail=detail)
        if not console.is_terminal and time.monotonic() - logged > _LOG_EVERY_S:
            logger.info("%s: %d of %d %s, %s", what, done, total, unit, detail)
            logged = time.monotonic()

    with bar:
        yield report
