"""`diphase serve`: a cluster in the foreground, until Ctrl-C or SIGTERM.

The first signal drains: running requests finish, new ones are refused. The second ends everything at once.
A signal during the start gives the start up.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue

from rich.console import Console

from .config import ClusterConfig
from .supervisor import Cluster, running, until
from .terminal import StartDisplay


class StopSignals:
    """Counts SIGINT and SIGTERM: the first asks for a drain, the second for an end at once."""

    def __init__(self, first: Callable[[], None] = lambda: None) -> None:
        """`first`: called at the first signal, from a thread, also while the event loop is busy."""
        self.drain = asyncio.Event()
        self.now = asyncio.Event()
        self._first = first

    def receive(self) -> None:
        """One signal."""
        if self.drain.is_set():
            self.now.set()
        self.drain.set()

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Receives the process's signals inside the block."""
        # Not the loop's own handlers: the start of Ray keeps the loop waiting for seconds, and whoever
        # pressed Ctrl-C in silence. A SimpleQueue may be put to in a signal handler.
        came: SimpleQueue[bool] = SimpleQueue()
        reader = threading.Thread(target=self._read, args=(asyncio.get_running_loop(), came))
        reader.start()
        before = {
            number: signal.signal(number, lambda *_: came.put(True))
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            came.put(False)
            reader.join()

    def _read(self, loop: asyncio.AbstractEventLoop, came: SimpleQueue[bool]) -> None:
        told = False
        while came.get():
            loop.call_soon_threadsafe(self.receive)
            if not told:
                told = True
                # Nobody reads the output any more (rich then exits): the second signal still counts.
                with contextlib.suppress(OSError, SystemExit):
                    self._first()


async def serve(config: ClusterConfig, console: Console) -> int:
    """Runs a cluster until a signal comes; the exit status.

    Raises:
        DiphaseError: it could not be started, or cannot go on.
    """
    stop = StopSignals(
        lambda: console.print("stopping; Ctrl-C again does not wait for running requests", highlight=False)
    )
    with stop.installed():
        async with contextlib.AsyncExitStack() as stack:
            with StartDisplay(console) as display:
                cluster = await until(
                    stop.drain, stack.enter_async_context(running(config, display.report, stop.now))
                )
            if cluster is None:
                console.print("stopped before the cluster was up")
                return 130
            _announce(config, cluster, console)
            await until(stop.drain, cluster.wait())
            await until(stop.now, cluster.drain())
        console.print("stopped")
    return 0


def _announce(config: ClusterConfig, cluster: Cluster, console: Console) -> None:
    pools = ", ".join(
        f"{pool.workers} {role}" for role, pool in config.pools.placements().items() if pool.workers
    )
    console.print(
        f"serving {config.model.name} with {pools} on {', '.join(cluster.addresses)}", highlight=False
    )
    for address in cluster.addresses[:1]:
        console.print(
            f'try: diphase generate --address {address} "The capital of France is"', highlight=False
        )
