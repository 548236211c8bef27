"""The supervisor's gRPC service: gateways pass on what operators ask. Knows no change; it runs them, tells
how they go, and goes on with them when nobody listens any more."""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio

from ..proto import cluster_pb2 as pb
from ..proto.cluster_pb2_grpc import SupervisorServicer, add_SupervisorServicer_to_server
from ..proto.errors import ConfigError, DiphaseError
from ..proto.rpc import INTERNAL_OPTIONS, host_port
from .changes import Changes

logger = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]


class Control(SupervisorServicer):
    """Serves from open() to close()."""

    def __init__(self, changes: Changes, cluster_token: str) -> None:
        self._changes = changes
        self._bearer = f"Bearer {cluster_token}"
        self._running: set[asyncio.Task[None]] = set()
        self._server = grpc.aio.server(options=INTERNAL_OPTIONS)
        add_SupervisorServicer_to_server(self, self._server)

    async def open(self, host: str) -> str:
        """Listens on any free port of `host`; host:port.

        Raises:
            ConfigError: that is no address of this machine.
        """
        try:
            port = self._server.add_insecure_port(host_port(host, 0))
        except RuntimeError as exc:
            raise ConfigError(
                f"the supervisor cannot listen on {host}: it is no address of this machine"
            ) from exc
        await self._server.start()
        return host_port(host, port)

    async def close(self) -> None:
        """Gives up what is under way. Idempotent."""
        await self._server.stop(None)
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    async def Change(self, request: pb.ChangeRequest, context: Context) -> AsyncIterator[pb.ChangeProgress]:
        shown = dict(context.invocation_metadata() or ()).get("authorization", "")
        if not hmac.compare_digest(str(shown).encode(), self._bearer.encode()):
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "the cluster's token is missing or wrong")
        progress: asyncio.Queue[pb.ChangeProgress | None] = asyncio.Queue()
        task = asyncio.create_task(self._make(request, progress), name="change")
        self._running.add(task)
        task.add_done_callback(self._ended)
        while (step := await progress.get()) is not None:
            yield step
        try:
            await task
        except Exception as exc:  # the top of a change: whoever asked is told; _ended logs it
            # Never UNAVAILABLE: by that gateways know that there is no supervisor.
            mine = isinstance(exc, ConfigError)
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT if mine else grpc.StatusCode.ABORTED,
                exc.message if isinstance(exc, DiphaseError) else f"{type(exc).__name__}: {exc}",
            )

    def _ended(self, task: asyncio.Task[None]) -> None:
        """However it ended, and whether or not anybody listens still."""
        self._running.discard(task)
        if task.cancelled():
            logger.warning("change_given_up")
        elif isinstance(error := task.exception(), DiphaseError):
            logger.warning("change_failed error=%r", error.message)
        elif error is not None:
            logger.error("change_failed", exc_info=error)

    async def _make(
        self, request: pb.ChangeRequest, progress: asyncio.Queue[pb.ChangeProgress | None]
    ) -> None:
        def say(worker_id: str, step: str) -> None:
            logger.info("change worker_id=%s step=%r", worker_id, step)
            progress.put_nowait(pb.ChangeProgress(worker_id=worker_id, step=step))

        try:
            await self._changes.make(request, say)
        finally:
            progress.put_nowait(None)
