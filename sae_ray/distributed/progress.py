"""A progress line for long work: a bar on a terminal, a logged line now and then elsewhere."""

import logging
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sae_ray.distributed.data import Progress as IndexProgress

logger = logging.getLogger(__name__)

_LOG_EVERY_S = 15


def watch(steps: Iterator[IndexProgress]) -> IndexProgress | None:
    """Run an index to its end, showing how far it is; return the last step."""
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("indexing"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("shards  {task.fields[detail]}"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )
    last: IndexProgress | None = None
    started = logged = time.monotonic()
    with bar:
        task = bar.add_task("", total=None, detail="starting")
        for last in steps:
            now = time.monotonic()
            detail = f"{last.rows:,} rows, {last.tokens / (now - started):,.0f} tokens/s"
            bar.update(task, total=last.num_shards, completed=last.shards, detail=detail)
            if not console.is_terminal and now - logged > _LOG_EVERY_S:
                logger.info("indexing: %d of %d shards, %s", last.shards, last.num_shards, detail)
                logged = now
    return last
