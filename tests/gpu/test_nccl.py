"""NCCL itself, between two GPUs of one machine: real owner processes, real communicators."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from diphase.kv_transfer.base import Done, Failed, Fenced, PeerDown

from ..conformance.region_memory import ON_GPU, GpuMemory, num_gpus
from ..conformance.transport_ends import End

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(num_gpus() < 2, reason="NCCL needs two CUDA devices: it takes none twice"),
]
SIZE = 8 << 20


@pytest.fixture
def pair() -> Iterator[tuple[End, End]]:
    """`a` on the first GPU may write to `b` on the second."""
    a, b = (
        End("nccl" + ON_GPU, name, memory=GpuMemory(SIZE, device)) for device, name in enumerate(("a", "b"))
    )
    b.transport.admit("a")
    a.transport.connect(b.transport.endpoint(), 60.0)
    yield a, b
    a.close()
    b.close()


def test_bytes_reach_the_other_gpu_in_the_order_of_the_calls(pair: tuple[End, End]) -> None:
    a, b = pair
    rng = np.random.default_rng(3)
    data = rng.integers(0, 256, SIZE, dtype=np.uint8)
    a.bytes[:] = data
    wanted = np.zeros(SIZE, dtype=np.uint8)
    transfers, tags = [], []
    for i in range(20):
        places = rng.permutation(SIZE // 16384)[:64].reshape(2, -1) * 16384
        length = int(rng.integers(1, 16385))
        for begin, to in places.T.tolist():
            wanted[to : to + length] = data[begin : begin + length]
        tags.append(b"%d" % i)
        transfers.append(a.write("b", [(s, t, length) for s, t in places.T.tolist()], tags[-1], 60.0))
    a.until(lambda: len(a.terminals()) == 20, b)
    assert a.terminals() == [Done(transfer) for transfer in transfers]
    b.until(lambda: len(b.tags()) == 20, a)
    assert b.tags() == tags
    np.testing.assert_array_equal(b.bytes, wanted)


def test_what_is_cancelled_is_over_when_the_fence_holds(pair: tuple[End, End]) -> None:
    a, b = pair
    a.bytes[:] = 1
    late = [a.write("b", [(0, 0, SIZE)], b"late", 60.0) for _ in range(6)]
    for transfer in late:
        a.transport.cancel(transfer)
    a.until(lambda: len(a.of(Failed)) == 6, b)
    b.transport.fence("a", 20.0)
    b.until(lambda: b.of(Fenced) == [Fenced("a", True)], a)
    b.bytes[:] = 9
    after = a.write("b", [(0, 0, 8)], b"after", 60.0)
    a.until(lambda: Done(after) in a.events, b)
    assert (b.bytes[:8] == 1).all()
    assert (b.bytes[8:] == 9).all()


def test_a_killed_owner_ends_the_connection_and_leaves_the_pool_alone(pair: tuple[End, End]) -> None:
    a, b = pair
    first = a.write("b", [(0, 0, SIZE)], b"first", 60.0)
    a.until(lambda: Done(first) in a.events, b)
    (owner,) = b.transport._medium._owners  # type: ignore[attr-defined]
    owner.kill()
    a.until(lambda: [event.peer for event in a.of(PeerDown)] == ["b"], b)
    b.until(lambda: [event.peer for event in b.of(PeerDown)] == ["a"], a)
    b.bytes[:] = 9
    assert (b.bytes == 9).all()
