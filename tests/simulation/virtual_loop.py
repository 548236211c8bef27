"""An event loop whose time jumps to the next timer: hours pass in milliseconds, and a seed repeats a run
exactly."""

from __future__ import annotations

import asyncio
import math
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class NothingLeftToHappen(RuntimeError):
    """Every task waits for something that no timer will bring: the simulated program has locked up."""


class _JumpingSelector(selectors.SelectSelector):
    """Instead of waiting for a timeout, lets the loop's time pass."""

    def __init__(self, next_timer: Callable[[], float | None]) -> None:
        super().__init__()
        self.now = 0.0
        self._next_timer = next_timer

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if ready:
            return ready
        if timeout is None:
            raise NothingLeftToHappen("no timer is set and nothing is ready")
        if timeout > 0.0:
            # Exactly the timer's own time: now + (when - now) may round to a moment before it.
            when = self._next_timer()
            self.now = self.now + timeout if when is None else max(self.now, when)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """Time starts at 0 and moves only when nothing else can happen. Threads and sockets have no place
    here."""

    def __init__(self) -> None:
        self._jumping = _JumpingSelector(self._next_timer)
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now

    def busy(self, seconds: float) -> None:
        """A callback takes so long: timers are late by that."""
        self._jumping.now += seconds

    @property
    def _clock_resolution(self) -> float:
        """How early timers may fire: not at all, so that what is due at t runs at t."""
        return math.ulp(self.time())

    @_clock_resolution.setter
    def _clock_resolution(self, value: float) -> None:
        """The base class sets the real clock's."""

    def _next_timer(self) -> float | None:
        scheduled: list[asyncio.TimerHandle] = self._scheduled  # type: ignore[attr-defined]
        return scheduled[0].when() if scheduled else None


class VirtualClock:
    """The Clock of objects on a VirtualLoop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def now(self) -> float:
        return self._loop.time()


def run_virtually(main: Coroutine[Any, Any, T], *, limit_s: float = 3600.0) -> T:
    """asyncio.run on a fresh VirtualLoop; `limit_s` is virtual."""

    async def limited() -> T:
        async with asyncio.timeout(limit_s):
            return await main

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(limited())
