"""One end of a transport in this process, with what tests ask of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from diphase.kv_transfer.base import (
    Done,
    Event,
    Failed,
    Notified,
    Region,
    Segments,
    Transport,
    TransportContext,
)
from diphase.kv_transfer.config import IN_PROCESS, TRANSPORTS
from diphase.kv_transfer.registry import load_factory
from diphase.kv_transfer.transports.local import LocalHub
from diphase.kv_transfer.transports.socket_transport import SocketTransport
from diphase.kv_transfer.transports.tcp import TcpMedium
from diphase.proto.clock import MonotonicClock
from diphase.proto.errors import ConfigError

from .host_gpu import DOUBLED, make_transport
from .region_memory import ON_GPU, Memory, make_memory, num_gpus


def _param(name: str) -> Any:
    """The suite's parameter for a transport; skipped where the library that it needs is not installed."""
    try:
        if name not in DOUBLED:
            load_factory(name)
    except ConfigError as error:
        return pytest.param(name, marks=pytest.mark.skip(reason=error.message))
    return name


HOST_MEMORY = ["local", "cuda_ipc", "shm", "nixl", "nccl", "tcp"]
"""Transports that this suite can ask on any machine, two of them with the doubles of host_gpu.py; one more is
one more name here."""
OVER_LANES = "tcp over 3 sockets"
"""The same transport, with stripes so small that almost every transfer has several."""


def _on_gpu(name: str) -> Any:
    """The same with memory of a real GPU."""
    marks = [pytest.mark.gpu, pytest.mark.skipif(num_gpus() == 0, reason="no CUDA device is usable here")]
    try:
        load_factory(name)
    except ConfigError as error:
        marks.append(pytest.mark.skip(reason=error.message))
    return pytest.param(name + ON_GPU, marks=marks)


NAMES = [*(_param(name) for name in TRANSPORTS if name in HOST_MEMORY), OVER_LANES]
NAMES += [_on_gpu("cuda_ipc"), _on_gpu("nixl")]
OVER_SOCKETS = [name for name in NAMES if name != IN_PROCESS]
PATIENCE_S = 20.0
SIZE = 1 << 20


def open_transport(name: str, context: TransportContext) -> Transport:
    if name != OVER_LANES:
        return make_transport(name, context)
    regions: list[Region] = []
    return SocketTransport(context, TcpMedium(context.host, regions, 3, min_stripe=64), regions)


class End:
    """One transport with one region, in this process."""

    def __init__(
        self,
        name: str,
        incarnation: str,
        hub: LocalHub | None = None,
        *,
        size: int = SIZE,
        token: str = "",
        memory: Memory | None = None,
        make: Callable[[TransportContext], Transport] | None = None,
    ) -> None:
        self.name = incarnation
        self.woken = threading.Event()
        self._memory = memory or make_memory(name, incarnation, size)
        self.bytes = self._memory.bytes
        context = TransportContext(
            incarnation=incarnation, wake=self.woken.set, clock=MonotonicClock(), token=token, hub=hub
        )
        self.transport: Transport = make(context) if make else open_transport(name, context)
        self.transport.register(self._memory.region)
        self.events: list[Event] = []

    def poll(self) -> None:
        while events := self.transport.poll():
            self.events.extend(events)

    def until(self, condition: Callable[[], bool], *others: End) -> None:
        """Polls until it holds."""
        limit = time.monotonic() + PATIENCE_S
        while True:
            self.woken.clear()
            self.poll()
            for other in others:
                other.poll()
            if condition():
                return
            assert time.monotonic() < limit, f"waited in vain; so far {self.events[-5:]}"
            self.woken.wait(0.05)

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    def terminals(self) -> list[Any]:
        return self.of(Done) + self.of(Failed)

    def tags(self) -> list[bytes]:
        return [event.tag for event in self.of(Notified)]

    def write(
        self, peer: str, segments: list[tuple[int, int, int]], tag: bytes = b"", s: float = 10.0
    ) -> int:
        return self.transport.write(peer, table(segments), tag, s)

    def close(self) -> None:
        self.transport.close()
        self._memory.close()


def table(segments: list[tuple[int, int, int]]) -> Segments:
    """(local offset, remote offset, length) in region 0 of both ends."""
    return np.array([[0, a, 0, b, n] for a, b, n in segments], dtype=np.int64).reshape(-1, 5)


def joined(make: Callable[..., End], name: str, **more: Any) -> tuple[End, End]:
    """`a` may write to `b`."""
    a, b = make(name, "a", **more), make(name, "b", **more)
    b.transport.admit("a")
    assert a.transport.connect(b.transport.endpoint(), 5.0) == "b"
    return a, b
