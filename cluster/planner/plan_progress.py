"""How far a search is, on a terminal: a line that goes when it ends. Knows no search."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.control import Control
from rich.segment import ControlType

from ...proto.clock import Clock, MonotonicClock
from .goodput import Mapped

A = TypeVar("A")
F = TypeVar("F")
NEW_LINE = Control(ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2))


@contextmanager
def watched(mapped: Mapped, console: Console, clock: Clock | None = None) -> Iterator[Mapped]:
    """Yields the map, which shows on the console how many of its questions are answered; nothing where that
    is no terminal.

    Written at each answer, not by rich's bars: those hide the cursor, which a signal that ends this process
    would leave hidden, and draw from a thread, which would be in the way of processes that are forked.
    """
    if not console.is_terminal:
        yield mapped
        return
    clock = clock or MonotonicClock()
    began, rounds = clock.now(), 0

    def show(answered: int, questions: int) -> None:
        console.control(NEW_LINE)
        line = f"simulating, round {rounds}: {answered} of {questions} done, {clock.now() - began:.0f} s"
        console.print(line, end="", highlight=False, no_wrap=True, overflow="ellipsis")

    def shown(function: Callable[[A], F], asked: Iterable[A], /) -> Iterator[F]:
        nonlocal rounds
        rounds += 1
        questions = list(asked)
        show(0, len(questions))
        for answered, found in enumerate(mapped(function, questions), start=1):
            show(answered, len(questions))
            yield found

    try:
        yield shown
    finally:
        console.control(NEW_LINE)
