"""A gateway as the command line and the supervisor see it: one channel, and its refusals as errors with a
sentence."""

from __future__ import annotations

import grpc
import grpc.aio

from ..proto import cluster_pb2
from ..proto.cluster_pb2_grpc import ClusterStub
from ..proto.errors import (
    Cancelled,
    ConfigError,
    DiphaseError,
    InvalidRequest,
    NotFound,
    Overloaded,
    WorkerLost,
)
from ..proto.rpc import INTERNAL_OPTIONS

CONNECT_S = 5.0

_ERRORS: dict[grpc.StatusCode, type[DiphaseError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.UNAUTHENTICATED: ConfigError,
}


def open_channel(address: str) -> grpc.aio.Channel:
    """A channel to host:port, not yet connected."""
    return grpc.aio.insecure_channel(address, options=INTERNAL_OPTIONS)


def credentials(token: str) -> tuple[tuple[str, str], ...]:
    """Metadata that shows the cluster token; gateways beyond loopback ask for it."""
    return (("authorization", f"Bearer {token}"),) if token else ()


def from_rpc(exc: grpc.aio.AioRpcError, address: str) -> DiphaseError:
    """The refusal of a gateway as the error that it stands for."""
    if exc.code() == grpc.StatusCode.UNAVAILABLE and "connect" in (exc.details() or "").lower():
        return ConfigError(f"no gateway answers at {address}: is `diphase serve` running there?")
    return _ERRORS.get(exc.code(), WorkerLost)(exc.details() or exc.code().name)


class StatusClient:
    """Asks gateways for their view of the cluster, over one kept channel each."""

    def __init__(self, token: str) -> None:
        self._metadata = credentials(token)
        self._channels: dict[str, grpc.aio.Channel] = {}

    async def ask(self, address: str, timeout_s: float) -> cluster_pb2.GetStatusResponse:
        """One gateway's view.

        Raises:
            TimeoutError: it is silent for `timeout_s`.
            DiphaseError: nobody is there, or it refuses.
        """
        channel = self._channels.get(address)
        if channel is None:
            channel = self._channels[address] = open_channel(address)
        try:
            status: cluster_pb2.GetStatusResponse = await ClusterStub(channel).GetStatus(
                cluster_pb2.GetStatusRequest(), timeout=timeout_s, metadata=self._metadata
            )
            return status
        except grpc.aio.AioRpcError as exc:
            if exc.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
                raise TimeoutError(f"the gateway at {address} is silent") from exc
            # A channel that lost its server waits longer and longer before it dials again; a new one does
            # not.
            await self._channels.pop(address).close(None)
            raise from_rpc(exc, address) from exc

    async def close(self) -> None:
        for channel in self._channels.values():
            await channel.close(None)
        self._channels.clear()
