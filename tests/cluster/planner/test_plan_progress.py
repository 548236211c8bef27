"""What is shown while a search runs."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterable
from typing import Any

from diphase.cluster.planner.plan_progress import watched
from rich.console import Console


def test_a_terminal_shows_how_many_of_the_questions_are_answered() -> None:
    screen = io.StringIO()
    with watched(map, Console(file=screen, force_terminal=True, width=100)) as shown:
        assert list(shown(abs, [-1, -2, -3])) == [1, 2, 3]
        assert "round 1" in screen.getvalue()
        assert "3/3" in screen.getvalue()
        assert list(shown(abs, (-4,))) == [4]
        assert threading.active_count() == 1 or not any(
            "rich" in type(thread).__module__ for thread in threading.enumerate()
        )
    assert "round 2" in screen.getvalue()
    assert "1/1" in screen.getvalue()


def test_something_is_shown_before_the_first_answer() -> None:
    screen = io.StringIO()
    seen: list[str] = []

    def mapped(function: Callable[[Any], Any], asked: Iterable[Any], /) -> Iterable[Any]:
        seen.append(screen.getvalue())
        return map(function, asked)

    with watched(mapped, Console(file=screen, force_terminal=True, width=100)) as shown:
        list(shown(abs, [-1, -2]))
    assert "0/2" in seen[0]


def test_nothing_is_shown_elsewhere() -> None:
    screen = io.StringIO()
    with watched(map, Console(file=screen)) as shown:
        assert shown is map
    assert not screen.getvalue()
