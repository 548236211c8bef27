"""The way from a gateway to the supervisor, for those who only reach a gateway. Passes on what both say and
knows nothing of what a change is."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import grpc
import grpc.aio

from ..proto import cluster_pb2 as pb
from ..proto.cluster_pb2_grpc import SupervisorStub
from ..proto.errors import WorkerLost
from ..proto.rpc import INTERNAL_OPTIONS


class SupervisorLink:
    """Dials for each change: there are few of them."""

    def __init__(self, address: Callable[[], str], cluster_token: str) -> None:
        """`address`: the supervisor's host:port now; empty while it is not known."""
        self._address = address
        self._metadata = (("authorization", f"Bearer {cluster_token}"),) if cluster_token else ()

    async def change(self, request: pb.ChangeRequest) -> AsyncIterator[pb.ChangeProgress]:
        """What the supervisor says while it makes the change; ends when that is complete.

        Raises:
            WorkerLost: the supervisor is not known, or not there.
            grpc.aio.AioRpcError: it refuses, or could not make the change.
        """
        address = self._address()
        if not address:
            raise WorkerLost("no supervisor of this cluster is known here; is `diphase serve` running?")
        async with grpc.aio.insecure_channel(address, options=INTERNAL_OPTIONS) as channel:
            try:
                async for progress in SupervisorStub(channel).Change(request, metadata=self._metadata):
                    yield progress
            except grpc.aio.AioRpcError as exc:
                # The supervisor itself never answers so (cluster/control.py).
                if exc.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise
                raise WorkerLost(
                    f"the supervisor at {address} does not answer; is `diphase serve` still running?"
                ) from exc
