"""How far a search is, on a terminal: a line that goes when it ends. Knows no search."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .goodput import Mapped

A = TypeVar("A")
F = TypeVar("F")


@contextmanager
def watched(mapped: Mapped, console: Console) -> Iterator[Mapped]:
    """Yields the map, which shows on the console how many of its questions are answered; nothing where that
    is no terminal."""
    if not console.is_terminal:
        yield mapped
        return
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    rounds = 0
    # Drawn at each answer: a thread that draws in between would be in the way of processes that are forked.
    with Progress(
        *columns,
        console=console,
        transient=True,
        auto_refresh=False,
        redirect_stdout=False,
        redirect_stderr=False,
    ) as progress:
        bar = progress.add_task("simulating", total=None)

        def shown(function: Callable[[A], F], asked: Iterable[A], /) -> Iterator[F]:
            nonlocal rounds
            questions = list(asked)
            rounds += 1
            description = f"simulating, round {rounds}"
            progress.update(bar, description=description, total=len(questions), completed=0, refresh=True)
            for found in mapped(function, questions):
                progress.update(bar, advance=1, refresh=True)
                yield found

        yield shown
