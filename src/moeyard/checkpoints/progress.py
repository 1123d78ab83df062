"""A bar while a checkpoint is read: rich's where it is installed and stderr is a terminal, else a line on stderr."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

SECONDS = 0.2
"""Between two lines."""


@contextmanager
def progress(label: str, total: int, shown: bool | None) -> Iterator[Callable[[int], None]]:
    """Gives a function that takes bytes as they are read. `shown` None: where stderr is a terminal."""
    terminal = sys.stderr.isatty()
    if not (terminal if shown is None else shown):
        yield lambda _: None
        return
    with _bar(label, total) if terminal and find_spec("rich") else _line(label, total) as advance:
        yield advance


@contextmanager
def _bar(label: str, total: int) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda size: bar.advance(task, size)


@contextmanager
def _line(label: str, total: int) -> Iterator[Callable[[int], None]]:
    done, last = 0, 0.0

    def advance(size: int) -> None:
        nonlocal done, last
        done += size
        now = time.monotonic()
        if now - last >= SECONDS or done == total:
            last = now
            sys.stderr.write(f"\r{label}: {done / 1e9:.2f} of {total / 1e9:.2f} GB")
            sys.stderr.flush()

    try:
        yield advance
    finally:
        sys.stderr.write("\n")
