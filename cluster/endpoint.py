"""A gateway as the command line and the supervisor see it: one channel, and its refusals as errors with a
sentence."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Set
from typing import TypeVar

import grpc
import grpc.aio

from ..proto import cluster_pb2, inference_pb2
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
from ..proto.inference_pb2_grpc import InferenceStub
from ..proto.rpc import INTERNAL_OPTIONS

CONNECT_S = 5.0
LINK_S = 20.0
"""How long gateways may take to reach workers that serve already."""
LINK_RETRY_S = 0.05
WILDCARDS = ("0.0.0.0", "::")
"""Hosts that mean every interface."""

Answer = TypeVar("Answer")

_ERRORS: dict[grpc.StatusCode, type[DiphaseError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.CANCELLED: Cancelled,
}

_LOST = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
)
# The first words of gRPC's core, which has no code of its own for each case.
_CUT_OFF = re.compile(
    r"cancelling all calls|stream removed|socket closed|connection reset|broken pipe|(received )?rst_stream"
    r"|goaway|recvmsg",
    re.IGNORECASE,
)
_ABSENT = re.compile(r"failed to connect|connections to all backends failing", re.IGNORECASE)
_UNRESOLVED = re.compile(r"errors resolving|dns resolution failed", re.IGNORECASE)


def open_channel(address: str) -> grpc.aio.Channel:
    """A channel to host:port, not yet connected."""
    return grpc.aio.insecure_channel(address, options=INTERNAL_OPTIONS)


def credentials(token: str) -> tuple[tuple[str, str], ...]:
    """Metadata that shows the cluster token; gateways beyond loopback ask for it."""
    return (("authorization", f"Bearer {token}"),) if token else ()


def from_rpc(exc: grpc.aio.AioRpcError, address: str) -> DiphaseError:
    """The refusal of a gateway as the error that it stands for; the words of gRPC's core as a sentence."""
    details = exc.details() or ""
    if exc.code() == grpc.StatusCode.UNAUTHENTICATED:
        return ConfigError(
            f"the gateway at {address} asks for the cluster's token: give it with "
            "--set security.cluster_token=... or --config FILE"
        )
    if _UNRESOLVED.match(details):
        return ConfigError(f"the host name {address.rpartition(':')[0] or address} cannot be resolved")
    if exc.code() in _LOST and _CUT_OFF.match(details):
        return WorkerLost(f"the gateway at {address} stopped before its answer was complete; try again")
    if exc.code() == grpc.StatusCode.UNAVAILABLE and _ABSENT.match(details):
        return ConfigError(f"no gateway answers at {address}: is `diphase serve` running there?")
    return _ERRORS.get(exc.code(), WorkerLost)(details or exc.code().name)


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
        return await self._status(cluster_pb2.GetStatusRequest(), address, timeout_s)

    async def glance(self, address: str, timeout_s: float) -> cluster_pb2.GetStatusResponse:
        """As ask(), without what workers would have to be asked for: a stopped one does not delay it."""
        return await self._status(cluster_pb2.GetStatusRequest(glance=True), address, timeout_s)

    async def _status(
        self, request: cluster_pb2.GetStatusRequest, address: str, timeout_s: float
    ) -> cluster_pb2.GetStatusResponse:
        status: cluster_pb2.GetStatusResponse = await self._call(
            address,
            lambda channel: ClusterStub(channel).GetStatus(
                request, timeout=timeout_s, metadata=self._metadata
            ),
        )
        return status

    async def trace(self, address: str, request_id: str, timeout_s: float) -> cluster_pb2.GetTraceResponse:
        """What one gateway and its workers remember of a request.

        Raises:
            NotFound: nothing.
            TimeoutError, DiphaseError: as ask().
        """
        request = cluster_pb2.GetTraceRequest(request_id=request_id)
        trace: cluster_pb2.GetTraceResponse = await self._call(
            address,
            lambda channel: ClusterStub(channel).GetTrace(
                request, timeout=timeout_s, metadata=self._metadata
            ),
        )
        return trace

    async def not_ready(self, address: str, timeout_s: float) -> str:
        """Which workers one gateway cannot use and why, as a sentence; empty when there is none.

        Raises:
            TimeoutError, DiphaseError: as ask().
        """
        request = inference_pb2.HealthRequest()
        health: inference_pb2.HealthResponse = await self._call(
            address,
            lambda channel: InferenceStub(channel).Health(
                request, timeout=timeout_s, metadata=self._metadata
            ),
        )
        return str(health.detail)

    async def _call(self, address: str, method: Callable[[grpc.aio.Channel], Awaitable[Answer]]) -> Answer:
        channel = self._channels.get(address)
        if channel is None:
            channel = self._channels[address] = open_channel(address)
        try:
            return await method(channel)
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


async def wait_linked(client: StatusClient, address: str, workers: Set[str]) -> None:
    """Until the gateway at `address` has a stream to each of `workers`.

    Raises:
        WorkerLost: it has not after LINK_S; the message has the gateway's reason.
    """
    missing = workers
    try:
        async with asyncio.timeout(LINK_S):
            while True:
                missing = workers - await _linked(client, address)
                if not missing:
                    return
                await asyncio.sleep(LINK_RETRY_S)
    except TimeoutError:
        sentence = f"the gateway at {address} gets no stream to {', '.join(sorted(missing))}"
        if why := await _why(client, address):
            sentence += f"; it says: {why}"
        raise WorkerLost(sentence) from None


async def _linked(client: StatusClient, address: str) -> set[str]:
    """Workers that the gateway sees as ready."""
    try:
        view = await client.ask(address, LINK_S)
    except (WorkerLost, ConfigError):  # it is being restarted; what lasts is told at the end
        return set()
    return {worker.worker_id for worker in view.workers if worker.state == "ready"}


async def _why(client: StatusClient, address: str) -> str:
    try:
        return await client.not_ready(address, CONNECT_S)
    except (TimeoutError, DiphaseError):
        return ""
