"""The thread of a socket transport: selector, commands from the event loop, timers, events to it.

Knows connections and no peers (socket_peers.py). Everything here runs on the one thread, except start(),
post() and stop().
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import selectors
import threading
import time
from collections import deque
from collections.abc import Callable
from heapq import heappop, heappush
from typing import Protocol

from ..base import Event, TransportContext
from .framing import Connection

MAX_UNREAD = 4096
"""Events that nobody polled; until somebody does, no connection that brings notices is read."""
SELECTOR_S = 0.001
"""Selectors round their timeouts up to this: shorter pauses, in which no socket is looked at, are slept."""

_log = logging.getLogger(__name__)


class Crew(Protocol):
    """What the thread serves: socket_peers.SocketPeers."""

    def open(self) -> None:
        """The thread has begun."""
        ...

    def work(self) -> float | None:
        """Moves bytes for a moment; when it wants to run again (seconds, 0.0: at once), None: nothing to
        do."""
        ...

    def flush(self) -> None:
        """Sends what has been queued."""
        ...

    def close(self) -> None:
        """The thread ends, and everything with it."""
        ...


class SocketThread:
    """`events` is filled here and emptied by poll() on the event loop's thread."""

    def __init__(self, context: TransportContext, name: str) -> None:
        self._thread = threading.Thread(target=self._run, name=f"kv-{name}", daemon=True)
        self._name = name
        self.events: deque[Event] = deque()
        self.crash: Exception | None = None
        """What ended the thread, if it was not stop()."""
        self.paused = False
        """Whether nobody polls and notices wait in the connections."""
        self.stopping = False
        self.clock = context.clock
        self._wake = context.wake
        self._news = False
        self._crew: Crew | None = None
        self._commands: deque[Callable[[], None]] = deque()
        self._alarmed = False
        self._selector = selectors.DefaultSelector()
        self._alarm, self._alarm_in = os.pipe()
        os.set_blocking(self._alarm, False)
        os.set_blocking(self._alarm_in, False)
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._counter = itertools.count(1)

    # From the event loop's thread.

    def start(self, crew: Crew) -> None:
        self._crew = crew
        self._thread.start()

    def post(self, command: Callable[[], None]) -> None:
        """Runs a command on this thread, in the order of the calls. Nothing happens once it was stopped."""
        self._commands.append(command)
        if not self.stopping and not self._alarmed:
            # The thread takes the alarm down before it looks at the commands: none is overlooked.
            self._alarmed = True
            with contextlib.suppress(BlockingIOError):  # a full pipe has woken the thread already
                os.write(self._alarm_in, b"!")

    def stir(self) -> None:
        """From any thread: has the crew asked again whether it wants to work."""
        self.post(_nothing)

    def stop(self, crew: Crew) -> None:
        """Ends the thread and everything it has. Blocks."""
        if self._thread.ident is not None:
            self.post(self._end)
            self._thread.join()
        else:
            self._close(crew)
        os.close(self._alarm)
        os.close(self._alarm_in)

    # On the thread.

    def run_commands(self) -> None:
        """Before anything that must come after what the event loop asked for."""
        while self._commands:
            self._commands.popleft()()

    def at(self, deadline: float, action: Callable[[], None]) -> None:
        """Runs an action at a time of the clock."""
        heappush(self._timers, (deadline, next(self._counter), action))

    def emit(self, event: Event) -> None:
        self.events.append(event)
        self._news = True
        if len(self.events) >= MAX_UNREAD:
            self.paused = True

    def watch(self, connection: Connection, *, reading: bool = True) -> None:
        """What the selector waits for: room to send if something is queued, and news if `reading`."""
        mask = 0 if connection.idle else selectors.EVENT_WRITE
        if reading:
            mask |= selectors.EVENT_READ
        if mask == connection.watched:
            return
        if not connection.watched:
            self._selector.register(connection.sock, mask, connection.on_ready)
        elif not mask:
            # With no mask it would still report a hang-up, for ever.
            self._selector.unregister(connection.sock)
        else:
            self._selector.modify(connection.sock, mask, connection.on_ready)
        connection.watched = mask

    def unwatch(self, connection: Connection) -> None:
        if connection.watched:
            self._selector.unregister(connection.sock)
            connection.watched = 0

    def discard(self, connection: Connection) -> None:
        self.unwatch(connection)
        connection.close()

    @property
    def selector(self) -> selectors.BaseSelector:
        return self._selector

    # Inside.

    def _run(self) -> None:
        crew = self._crew
        assert crew is not None  # start() has set it
        try:
            self._selector.register(self._alarm, selectors.EVENT_READ, self._on_alarm)
            crew.open()
            while not self.stopping:
                self._turn(crew)
        except Exception as error:  # the top of this thread: nobody above it could know
            _log.exception("transport_thread_crashed name=%s", self._name)
            self.crash = error
            self._news = True
        finally:
            self._close(crew)

    def _turn(self, crew: Crew) -> None:
        self.run_commands()
        again = crew.work()
        now = self.clock.now()
        while self._timers and self._timers[0][0] <= now:
            heappop(self._timers)[2]()
        crew.flush()
        self._tell()
        timeout = again
        if self.stopping:  # a stop that was just run sends no alarm
            timeout = 0.0
        elif self._timers:
            until = max(0.0, self._timers[0][0] - now)
            timeout = until if timeout is None else min(timeout, until)
        if timeout is not None and 0.0 < timeout < SELECTOR_S:
            time.sleep(timeout)
            timeout = 0.0
        for key, mask in self._selector.select(timeout):
            key.data(mask)
            self._tell()

    def _tell(self) -> None:
        if self._news:
            self._news = False
            self._wake()

    def _on_alarm(self, mask: int) -> None:
        os.read(self._alarm, 4096)
        self._alarmed = False

    def _end(self) -> None:
        self.stopping = True

    def _close(self, crew: Crew) -> None:
        self.stopping = True
        crew.close()
        self.run_commands()  # whose writes fail now
        self._selector.close()
        self._tell()


def _nothing() -> None:
    """A command that only wakes the thread."""
