"""Where the command line writes: results to standard output; bars, status and errors to standard error."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from io import TextIOBase
from typing import TextIO

import typer
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table


def note(message: str) -> None:
    """Prints a dim line to standard error."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"[dim]{escape(message)}[/dim]")


def error(message: str) -> None:
    """Prints an error as one line to standard error."""
    line = " ".join(message.split())
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"[bold red]error:[/bold red] {escape(line)}")


def table(content: Table) -> None:
    """Prints a table to standard output."""
    Console().print(content)


@contextmanager
def live(content: Table) -> Iterator[Live]:
    """Draws a table on standard output that changes inside the block; in a pipe its last state comes at the end."""
    screen = Console()
    try:
        with Live(content, console=screen, auto_refresh=False) as drawn:
            yield drawn
    finally:
        if not screen.is_terminal:  # on one, rich ends the line itself
            screen.line()


def write(text: str) -> None:
    """Writes model text to standard output as it is, without markup or wrapping, and flushes it."""
    typer.echo(text, nl=False)


@contextmanager
def progress(label: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """Shows a bar on standard error while the block runs; silent unless that is a terminal.

    Args:
        label: what is being done.
        total: number of steps; None shows a moving bar and the elapsed time.

    Yields:
        a function that advances the bar by a number of steps.
    """
    # Bound to today's standard error: rich draws there even while `without_bars` filters what others write.
    screen = Console(file=sys.stderr)
    columns: list[ProgressColumn] = [TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()]
    if total is not None:
        columns.insert(2, MofNCompleteColumn())
    with Progress(
        *columns,
        console=screen,
        disable=not screen.is_terminal,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    ) as bar:
        task = bar.add_task(label, total=total)
        yield lambda steps: bar.advance(task, steps)


class _WithoutBars(TextIOBase):
    """Hands on what is written, less progress bars: writes that begin with a carriage return, and their line end."""

    def __init__(self, target: TextIO) -> None:
        self.target, self.in_bar = target, False

    def write(self, text: str) -> int:
        """Writes the text unless it belongs to a bar."""
        bar = text.lstrip("\n").startswith("\r") or (self.in_bar and not text.strip())
        self.in_bar = bar
        return len(text) if bar else self.target.write(text)

    def flush(self) -> None:
        """Flushes what the text is handed on to."""
        self.target.flush()


@contextmanager
def without_bars() -> Iterator[None]:
    """Keeps the progress bars of other libraries off standard error; warnings still get there."""
    with redirect_stderr(_WithoutBars(sys.stderr)):
        yield


def size(count: float) -> str:
    """Returns bytes in words, e.g. `"1.5 MiB"`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
