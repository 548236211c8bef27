"""`diphase serve`: a cluster in the foreground, until Ctrl-C or SIGTERM.

The first signal drains: running requests finish, new ones are refused. The second ends everything at once.
A signal during the start gives the start up.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Coroutine, Iterator
from typing import Any, TypeVar

from rich.console import Console

from .config import ClusterConfig
from .supervisor import Cluster, running
from .terminal import StartDisplay

T = TypeVar("T")


class StopSignals:
    """Counts SIGINT and SIGTERM: the first asks for a drain, the second for an end at once."""

    def __init__(self) -> None:
        self.drain = asyncio.Event()
        self.now = asyncio.Event()

    def receive(self) -> None:
        """One signal."""
        if self.drain.is_set():
            self.now.set()
        self.drain.set()

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Receives the process's signals inside the block."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.receive)
        try:
            yield
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)


async def until(event: asyncio.Event, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`, or None when `event` is set first; `work` is then cancelled and has ended."""
    task = asyncio.ensure_future(work)
    waiter = asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait({task, waiter}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        return None
    finally:
        waiter.cancel()
        task.cancel()
        await asyncio.gather(task, waiter, return_exceptions=True)


async def serve(config: ClusterConfig, console: Console) -> int:
    """Runs a cluster until a signal comes; the exit status.

    Raises:
        DiphaseError: it could not be started, or cannot go on.
    """
    stop = StopSignals()
    with stop.installed():
        async with contextlib.AsyncExitStack() as stack:
            with StartDisplay(console) as display:
                cluster = await until(stop.drain, stack.enter_async_context(running(config, display.report)))
            if cluster is None:
                console.print("stopped before the cluster was up")
                return 130
            _announce(config, cluster, console)
            await until(stop.drain, cluster.wait())
            console.print("draining; Ctrl-C again stops at once")
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
