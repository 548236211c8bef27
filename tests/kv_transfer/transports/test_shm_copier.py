"""The thread that copies for shm, with arrays in place of pools."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from diphase.kv_transfer.transports.shm_copier import THREADS, Copier, Copy, Lane
from diphase.kv_transfer.transports.shm_slices import SLICE_BYTES, slices
from diphase.kv_transfer.transports.socket_peer import Job, Peer
from diphase.proto.errors import InternalError

PATIENCE_S = 20.0
SIZE = (THREADS + 3) * SLICE_BYTES


class Bench:
    """A copier and what its owner sees of it."""

    def __init__(self) -> None:
        self.stirred = threading.Semaphore(0)
        self.copier = Copier(self.stirred.release)
        self.source = np.arange(SIZE // 8, dtype=np.int64).view(np.uint8)
        self.target = np.zeros(SIZE, dtype=np.uint8)

    def copy(self, segments: list[list[int]], targets: list[Any] | None = None) -> Copy:
        """`segments`: source offset, target offset, length."""
        table = np.array([[0, a, 0, b, n] for a, b, n in segments], dtype=np.int64).reshape(-1, 5)
        num_bytes = int(table[:, 4].sum())
        job = Job(transfer_id=1, peer="p", segments=table, num_bytes=num_bytes, tag=b"", deadline=0.0)
        return Copy(
            peer=Peer(incarnation="p"),
            job=job,
            slices=slices(table, [self.source], [self.target] if targets is None else targets),
            left=num_bytes,
        )

    def finished(self, count: int) -> list[Copy]:
        copies: list[Copy] = []
        while len(copies) < count:
            assert self.stirred.acquire(timeout=PATIENCE_S)
            copies += self.copier.finished()
        return copies


class Gate:
    """In place of a target: says when a slice begins to be written there, and holds it until it may. With
    `first` only the first one."""

    def __init__(self, target: Any, *, first: bool = False) -> None:
        self.target = target
        self.first = first
        self.reached, self.go_on = threading.Event(), threading.Event()

    def __getitem__(self, where: slice) -> GatedView:
        return GatedView(self, self.target[where])

    def hold(self) -> None:
        if not (self.first and self.reached.is_set()):
            self.reached.set()
            assert self.go_on.wait(PATIENCE_S)


class GatedView:
    def __init__(self, gate: Gate, view: Any) -> None:
        self.gate, self.view = gate, view

    def __setitem__(self, where: slice, value: Any) -> None:
        self.gate.hold()
        self.view[where] = value


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.copier.close()
    assert "kv-shm-copies" not in {thread.name for thread in threading.enumerate()}


def test_pieces_of_every_length_arrive_whole_and_nothing_else_changes(bench: Bench) -> None:
    segments = [
        [0, 8, 1],
        [8, SLICE_BYTES + 3, SLICE_BYTES + 5],
        [1000, 100, 64],
        [2000, 2 * SLICE_BYTES + 9, 0],
    ]
    expected = np.zeros_like(bench.target)
    for a, b, n in segments:
        expected[b : b + n] = bench.source[a : a + n]
    copy = bench.copy(segments)
    bench.copier.submit(Lane(), copy)
    assert bench.finished(1) == [copy]
    assert np.array_equal(bench.target, expected)
    assert not bench.copier.has_finished


def test_copies_of_one_lane_end_in_order_and_the_later_bytes_stay(bench: Bench) -> None:
    lane = Lane()
    copies = [bench.copy([[i * 8, 0, SLICE_BYTES + 8]]) for i in range(4)]
    for copy in copies:
        bench.copier.submit(lane, copy)
    assert bench.finished(4) == copies
    assert np.array_equal(bench.target[: SLICE_BYTES + 8], bench.source[24 : 24 + SLICE_BYTES + 8])


def test_a_short_copy_does_not_wait_for_the_end_of_another_lane_s_long_one(bench: Bench) -> None:
    gate = Gate(bench.target, first=True)
    long, short = bench.copy([[0, 0, SIZE]], [gate]), bench.copy([[0, 0, 8]], [np.zeros(8, dtype=np.uint8)])
    bench.copier.submit(Lane(), long)
    assert gate.reached.wait(PATIENCE_S)
    bench.copier.submit(Lane(), short)
    assert bench.finished(1) == [short]
    gate.go_on.set()
    assert bench.finished(1) == [long]
    assert np.array_equal(bench.target, bench.source)


def test_what_was_given_up_ends_after_the_slices_at_hand(bench: Bench) -> None:
    gate = Gate(bench.target)
    lane = Lane()
    first, second = bench.copy([[0, 0, SIZE]], [gate]), bench.copy([[8, 0, 8]])
    bench.copier.submit(lane, first)
    bench.copier.submit(lane, second)
    assert gate.reached.wait(PATIENCE_S)
    first.void = second.void = True
    assert not bench.copier.has_finished, "a slice is still being written"
    gate.go_on.set()
    assert bench.finished(2) == [first, second]
    assert bench.target[THREADS * SLICE_BYTES :].max() == 0
    assert np.array_equal(bench.target[:16], bench.source[:16]), "nothing of the second was copied"


def test_close_waits_for_what_was_submitted(bench: Bench) -> None:
    copies = [bench.copy([[0, 0, SIZE]]) for _ in range(3)]
    for copy in copies:
        bench.copier.submit(Lane(), copy)
    bench.copier.close()
    assert sorted(map(id, bench.copier.finished())) == sorted(map(id, copies))
    assert np.array_equal(bench.target, bench.source)


def test_a_crash_is_told_to_who_asks(bench: Bench) -> None:
    bench.copier.submit(Lane(), bench.copy([[0, 0, 8]], []))
    assert bench.stirred.acquire(timeout=PATIENCE_S)
    assert bench.copier.has_finished
    with pytest.raises(InternalError, match="copies for shm crashed: IndexError"):
        bench.copier.finished()
