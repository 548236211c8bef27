"""What is shown while a search runs."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from diphase.cluster.planner.plan_progress import watched
from rich.console import Console


def terminal() -> tuple[Console, io.StringIO]:
    screen = io.StringIO()
    return Console(file=screen, force_terminal=True, width=100, color_system=None), screen


def test_a_terminal_shows_how_many_of_the_questions_are_answered() -> None:
    console, screen = terminal()
    threads = threading.active_count()
    with watched(map, console) as shown:
        assert list(shown(abs, [-1, -2, -3])) == [1, 2, 3]
        assert screen.getvalue().rpartition("\x1b[2K")[2] == "simulating, round 1: 3 of 3 done, 0 s"
        assert list(shown(abs, (-4,))) == [4]
        assert "round 2: 1 of 1 done" in screen.getvalue()
        assert threading.active_count() == threads
    assert screen.getvalue().endswith("\r\x1b[2K")
    assert "\x1b[?25l" not in screen.getvalue(), "the cursor stays, whatever ends the process"


def test_something_is_shown_before_the_first_answer() -> None:
    console, screen = terminal()
    seen: list[str] = []

    def mapped(function: Callable[[Any], Any], asked: Iterable[Any], /) -> Iterable[Any]:
        seen.append(screen.getvalue())
        return map(function, asked)

    with watched(mapped, console) as shown:
        list(shown(abs, [-1, -2]))
    assert "0 of 2 done" in seen[0]


def test_the_line_goes_with_an_error() -> None:
    console, screen = terminal()
    with pytest.raises(ZeroDivisionError), watched(map, console) as shown:
        list(shown(lambda one: 1 / one, [0]))
    assert screen.getvalue().endswith("\r\x1b[2K")


def test_nothing_is_shown_elsewhere() -> None:
    screen = io.StringIO()
    with watched(map, Console(file=screen)) as shown:
        assert shown is map
    assert not screen.getvalue()
