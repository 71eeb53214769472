"""Progress of a long command: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import contextlib
import typing as t

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINES = 10  # at most this many progress lines in a log, however many samples there are


class Show(t.Protocol):
    """Called with the number done, the total, and a message if there is one."""

    def __call__(self, done: int, total: int, message: str = "") -> None: ...


def silent(done: int, total: int, message: str = "") -> None:
    """The `Show` of callers who want none."""


@contextlib.contextmanager
def progress(title: str, console: Console | None = None) -> t.Iterator[Show]:
    """A `Show` for `title`, on standard error by default."""
    console = console or Console(stderr=True)
    if console.is_terminal:
        with _bar(title, console) as show:
            yield show
    else:
        yield _lines(title, console)


@contextlib.contextmanager
def _bar(title: str, console: Console) -> t.Iterator[Show]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bars:
        task = bars.add_task(title, total=None)

        def show(done: int, total: int, message: str = "") -> None:
            bars.update(task, completed=done, total=total)
            if message:
                console.print(message, markup=False, highlight=False)

        yield show


def _lines(title: str, console: Console) -> Show:
    told = 0

    def show(done: int, total: int, message: str = "") -> None:
        nonlocal told
        tenth = done * LINES // total
        if message or tenth > told:
            told = max(told, tenth)
            text = f"{title}: {done}/{total}" + (f", {message}" if message else "")
            console.print(text, markup=False, highlight=False, soft_wrap=True)

    return show
