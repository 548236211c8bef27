"""Where connections come in: nobody is heard but who says HELLO in time, with the cluster's token, and is
expected."""

from __future__ import annotations

import hmac
import logging
import selectors
from collections.abc import Iterable
from functools import partial
from typing import Any, Protocol

from ...proto.errors import TransferError
from ..base import TransportContext
from .endpoint import check_fields, read_endpoint
from .framing import MAX_BODY, Connection, FrameError
from .socket_medium import Medium
from .socket_peer import Kind
from .socket_thread import SocketThread

ACCEPT_AGAIN_S = 0.5
"""After an accept that failed."""
HELLO_TIMEOUT_S = 5.0
"""How long a stranger may stay silent."""
MAX_HELLO = 256 * 1024
"""Bytes of a stranger's first frame: what a library says of itself there goes with its devices."""
HELLO_FIELDS = {"token": str, "lane": int, "lanes": int, "session": str}

_log = logging.getLogger(__name__)


class Host(Protocol):
    """What the door asks of socket_peers.SocketPeers."""

    def welcome(self, connection: Connection, fields: dict[str, Any]) -> None:
        """Whoever connected is a peer from now on, or one more lane of one.

        Raises:
            TransferError: he is not expected.
        """
        ...


class Door:
    """The listener and those who have not been let in."""

    def __init__(
        self,
        context: TransportContext,
        medium: Medium,
        thread: SocketThread,
        host: Host,
    ) -> None:
        self._context = context
        self._medium = medium
        self._thread = thread
        self._host = host
        self._listener = medium.listen()
        self._strangers: set[Connection] = set()

    @property
    def address(self) -> Any:
        return self._listener.getsockname()

    def open(self) -> None:
        self._thread.selector.register(self._listener, selectors.EVENT_READ, self._on_listener)

    def close(self) -> None:
        for connection in list(self._strangers):
            self._discard(connection)
        self._listener.close()

    def heard(self, connection: Connection, kind: int, body: bytearray) -> None:
        """The first frame of a stranger."""
        self._thread.run_commands()  # he may have been admitted a moment ago
        self._thread.unwatch(connection)
        try:
            fields = self._identify(connection, kind, body)
            connection.max_body = MAX_BODY
            self._host.welcome(connection, fields)
        except TransferError as error:
            self._turn_away(connection, error.message)
        else:
            self._strangers.discard(connection)

    def _identify(self, connection: Connection, kind: int, body: bytearray) -> dict[str, Any]:
        """
        Raises:
            TransferError: he is not let in.
        """
        why = self._medium.greet(connection.sock)
        if why is not None:
            raise TransferError(why)
        if kind != Kind.HELLO:
            raise TransferError("a connection begins with HELLO")
        fields = read_endpoint(body, self._medium.name, HELLO_FIELDS)
        if not hmac.compare_digest(fields["token"].encode(), self._context.token.encode()):
            raise TransferError("wrong cluster token")
        if fields["lane"] == 0:
            check_fields(fields, self._medium.name, self._medium.hello_fields)
        return fields

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
            # Out of descriptors, say: whoever waits would be reported again and again.
            self._thread.selector.unregister(self._listener)
            self._thread.at(self._context.clock.now() + ACCEPT_AGAIN_S, self.open)
            return
        connection = Connection(sock)
        connection.max_body = MAX_HELLO
        self._strangers.add(connection)
        sink = _StrangerSink(self, connection)
        connection.on_ready = partial(self._on_stranger, connection, sink)
        self._thread.watch(connection)
        self._thread.at(self._context.clock.now() + HELLO_TIMEOUT_S, partial(self._expire, connection))

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
        self._thread.discard(connection)


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
