"""Calls a pump on the event loop: soon after a thread woke it, and when a deadline has come."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable

from ..proto.clock import Clock

_log = logging.getLogger(__name__)


class PumpTimer:
    """Before start() and after stop() nothing is called: who owns the pump calls it then."""

    def __init__(self, pump: Callable[[], None], clock: Clock) -> None:
        self._pump = pump
        self._clock = clock
        self._loop: asyncio.AbstractEventLoop | None = None
        self._handle: asyncio.TimerHandle | None = None
        self._due = math.inf
        self._woken = False
        self._broken: Callable[[Exception], None]

    def start(self, broken: Callable[[Exception], None]) -> None:
        """`broken` is told once when the pump raises, after which it is called no more."""
        self._broken = broken
        self._loop = asyncio.get_running_loop()
        self._schedule()
        self.wake()

    def stop(self) -> None:
        self._loop = None
        self._unschedule()

    def wake(self) -> None:
        """From any thread; any number of wakes before the loop comes round are one."""
        loop = self._loop
        if loop is None or self._woken:
            return
        self._woken = True
        try:
            loop.call_soon_threadsafe(self._on_wake)
        except RuntimeError:  # the loop has closed under a transport's thread: nobody is left to wake
            self._loop = None

    def arm(self, due: float) -> None:
        """The pump is called at `due` (clock seconds) at the latest; a later time does not replace an
        earlier."""
        if due < self._due:
            self._due = due
            self._schedule()

    def take_due(self, now: float) -> bool:
        """For the pump, whyever it was called: whether the time has come that was armed, which is over then.
        Until it is taken, the pump is called for it."""
        if now < self._due:
            return False
        self._due = math.inf
        self._unschedule()
        return True

    def _on_wake(self) -> None:
        self._woken = False
        self._call()

    def _on_time(self) -> None:
        self._handle = None
        self._call()
        if self._handle is None:
            self._schedule()

    def _call(self) -> None:
        if self._loop is None:
            return
        try:
            self._pump()
        except Exception as error:  # the top of the loop's callback: nobody above it could know
            _log.exception("pump_crashed")
            self.stop()
            self._broken(error)

    def _schedule(self) -> None:
        self._unschedule()
        if self._loop is not None and self._due < math.inf:
            self._handle = self._loop.call_later(max(0.0, self._due - self._clock.now()), self._on_time)

    def _unschedule(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
