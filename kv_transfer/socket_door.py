"""Where connections come in: nobody is heard but who says HELLO in time, with the cluster's token, and is
expected."""

from __future__ import annotations

import hmac
import logging
import selectors
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Protocol

from ..proto.errors import TransferError
from .base import TransportContext
from .endpoint import read_endpoint
from .framing import MAX_BODY, Connection, FrameError
from .socket_peer import Kind, Medium

HELLO_TIMEOUT_S = 5.0
"""How long a stranger may stay silent."""
MAX_HELLO = 65_536
"""Bytes of a stranger's first frame."""

_log = logging.getLogger(__name__)


class Host(Protocol):
    """What the door asks of socket_thread.SocketThread."""

    def run_commands(self) -> None: ...
    def at(self, deadline: float, action: Callable[[], None]) -> None: ...
    def welcome(self, connection: Connection, incarnation: str) -> bool: ...


class Door:
    """The listener and those who have not been let in."""

    def __init__(
        self,
        context: TransportContext,
        medium: Medium,
        selector: selectors.BaseSelector,
        host: Host,
    ) -> None:
        self._context = context
        self._medium = medium
        self._selector = selector
        self._host = host
        self._listener = medium.listen()
        self._strangers: set[Connection] = set()

    @property
    def address(self) -> Any:
        return self._listener.getsockname()

    def open(self) -> None:
        self._selector.register(self._listener, selectors.EVENT_READ, self._on_listener)

    def close(self) -> None:
        for connection in list(self._strangers):
            self._discard(connection)
        self._listener.close()

    def heard(self, connection: Connection, kind: int, body: bytearray) -> None:
        """The first frame of a stranger."""
        self._host.run_commands()  # he may have been admitted a moment ago
        try:
            incarnation = self._identify(connection, kind, body)
        except TransferError as error:
            self._turn_away(connection, error.message)
            return
        self._strangers.discard(connection)
        self._selector.unregister(connection.sock)
        connection.max_body = MAX_BODY
        if not self._host.welcome(connection, incarnation):
            self._turn_away(connection, f"incarnation {incarnation} is not expected here")

    def _identify(self, connection: Connection, kind: int, body: bytearray) -> str:
        """
        Raises:
            TransferError: he is not let in.
        """
        why = self._medium.greet(connection.sock)
        if why is not None:
            raise TransferError(why)
        if kind != Kind.HELLO:
            raise TransferError("a connection begins with HELLO")
        fields = read_endpoint(body, self._medium.name, {"token": str})
        if not hmac.compare_digest(fields["token"].encode(), self._context.token.encode()):
            raise TransferError("wrong cluster token")
        incarnation: str = fields["incarnation"]
        return incarnation

    def _turn_away(self, connection: Connection, why: str) -> None:
        _log.warning("stranger_refused transport=%s why=%r", self._medium.name, why)
        connection.queue(Kind.REFUSED, why.encode())
        try:
            connection.flush()
        except OSError as error:
            _log.debug("refusal_unsent why=%r", str(error))
        self._discard(connection)

    def _on_listener(self, mask: int) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError as error:
            _log.warning("accept_failed transport=%s why=%r", self._medium.name, str(error))
            return
        connection = Connection(sock)
        connection.max_body = MAX_HELLO
        self._strangers.add(connection)
        sink = _StrangerSink(self, connection)
        self._selector.register(sock, selectors.EVENT_READ, partial(self._on_stranger, connection, sink))
        self._host.at(self._context.clock.now() + HELLO_TIMEOUT_S, partial(self._expire, connection))

    def _on_stranger(self, connection: Connection, sink: _StrangerSink, mask: int) -> None:
        try:
            connection.read(sink)
        except (OSError, EOFError) as error:
            _log.info("stranger_left transport=%s why=%r", self._medium.name, str(error))
            self._discard(connection)

    def _expire(self, connection: Connection) -> None:
        if connection in self._strangers:
            self._discard(connection)

    def _discard(self, connection: Connection) -> None:
        self._strangers.discard(connection)
        if connection.sock in self._selector.get_map():
            self._selector.unregister(connection.sock)
        connection.close()


class _StrangerSink:
    """Hears one frame."""

    def __init__(self, door: Door, connection: Connection) -> None:
        self._door = door
        self._connection = connection

    def place(self, kind: int, body: bytearray, bulk_bytes: int) -> Iterable[memoryview]:
        raise FrameError("a stranger sends bulk")

    def frame(self, kind: int, body: bytearray) -> bool:
        self._door.heard(self._connection, kind, body)
        return False
