"""Asks the workers what they have transferred, and what happened to a request's hand-offs. A worker that
does not answer in time is left out: a view must not hang on whom it shows."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterable

from ..proto.worker_pb2 import GatewayMessage, Inspect, Inspected
from .worker_handle import WorkerHandle

ANSWER_S = 1.0
"""How long a worker has; it answers on its event loop, between two steps of the engine."""


class Inspector:
    """Questions of one gateway that are not answered yet."""

    def __init__(self) -> None:
        self._ids = itertools.count(1)
        self._open: dict[int, asyncio.Future[Inspected]] = {}

    async def ask(self, workers: Iterable[WorkerHandle], request_id: str = "") -> dict[str, Inspected]:
        """By worker_id, the answers of those that have a stream and answer within ANSWER_S. Cancelling it
        forgets the questions."""
        asked: dict[str, int] = {}
        loop = asyncio.get_running_loop()
        for worker in workers:
            asked[worker.worker_id] = number = next(self._ids)
            self._open[number] = loop.create_future()
            worker.send(GatewayMessage(inspect=Inspect(id=number, request_id=request_id)))
        futures = {worker_id: self._open[number] for worker_id, number in asked.items()}
        try:
            if futures:
                await asyncio.wait(futures.values(), timeout=ANSWER_S)
        finally:
            for number in asked.values():
                del self._open[number]
        return {worker_id: future.result() for worker_id, future in futures.items() if future.done()}

    def answered(self, answer: Inspected) -> None:
        """A worker has answered; too late is fine."""
        future = self._open.get(answer.id)
        if future is not None and not future.done():
            future.set_result(answer)
