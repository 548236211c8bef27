"""nixl between regions of host and device memory."""

from __future__ import annotations

import mmap
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from diphase.kv_transfer.base import DeviceMemory, Done, Event, Failed, Region, Transport, TransportContext
from diphase.kv_transfer.registry import load_factory
from diphase.proto.clock import MonotonicClock

pytest.importorskip("nixl_cu13")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
SIZE = 1 << 22
PATIENCE_S = 30.0


@dataclass
class End:
    """A transport with host memory as region 0 and device memory as region 1."""

    transport: Transport
    regions: list[Any]
    woken: threading.Event


@pytest.fixture
def ends() -> Iterator[tuple[End, End]]:
    made = []
    for incarnation in ("a", "b"):
        woken = threading.Event()
        host = mmap.mmap(-1, SIZE)
        device = torch.zeros(SIZE, dtype=torch.uint8, device="cuda:0")
        torch.cuda.synchronize()
        context = TransportContext(incarnation=incarnation, wake=woken.set, clock=MonotonicClock())
        transport = load_factory("nixl")(context)
        transport.register(Region(buffer=memoryview(host)))
        memory = DeviceMemory(device=0, pointer=device.data_ptr(), num_bytes=SIZE)
        transport.register(Region(buffer=None, device=memory))
        made.append(End(transport, [np.frombuffer(host, dtype=np.uint8), device], woken))
    made[1].transport.admit("a")
    made[0].transport.connect(made[1].transport.endpoint(), PATIENCE_S)
    yield made[0], made[1]
    for end in made:
        end.transport.close()


def test_bytes_go_between_every_pair_of_kinds_in_one_write(ends: tuple[End, End]) -> None:
    a, b = ends
    pattern = torch.randint(0, 256, (SIZE,), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    a.regions[0][:] = pattern.numpy()
    a.regions[1].copy_(pattern)
    torch.cuda.synchronize()
    quarter, piece = SIZE // 4, 4096
    rows = [
        [here, offset, there, (2 * here) * quarter + offset, piece // 2]
        for here in (0, 1)
        for there in (0, 1)
        for offset in range(0, quarter, piece)
    ]
    a.transport.write("b", np.array(rows, dtype=np.int64), b"all", PATIENCE_S)
    events: list[Event] = []
    limit = time.monotonic() + PATIENCE_S
    while not any(isinstance(event, Done | Failed) for event in events):
        assert time.monotonic() < limit
        a.woken.wait(0.05)
        a.woken.clear()
        events += a.transport.poll()
        b.transport.poll()
    assert isinstance(events[0], Done), events
    wanted = np.zeros(SIZE, dtype=np.uint8)
    for here, offset, _, target, length in rows:
        assert here in (0, 1)
        wanted[target : target + length] = pattern.numpy()[offset : offset + length]
    for got in (b.regions[0], b.regions[1].cpu().numpy()):
        np.testing.assert_array_equal(got, wanted)
