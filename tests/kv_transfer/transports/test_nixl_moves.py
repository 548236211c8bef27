"""Jobs on their way through NIXL: what is posted when, and what ends how."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

pytest.importorskip("nixl_cu13")

from diphase.kv_transfer.transports.nixl_moves import MAX_SLICES, SLICE_BYTES, Moves
from diphase.kv_transfer.transports.nixl_slices import Bases
from diphase.kv_transfer.transports.socket_peer import ID, Job
from diphase.proto.errors import TransferError

BASES = Bases(np.array([1 << 40]), np.array([-1]))


@dataclass
class Agent:
    """NIXL's part; the test says what is done and what fails."""

    posted: list[int] = field(default_factory=list)
    """Offset there of the first byte of each slice."""
    arrived: set[int] = field(default_factory=set)
    """Which of them are there, by position."""
    broken: set[int] = field(default_factory=set)
    notified: list[int] = field(default_factory=list)
    refuses: str = ""

    def write(self, kinds: Any, local: Any, remote: Any, name: str) -> int:
        if self.refuses == "write":
            raise TransferError("NIXL: no")
        self.posted.append(int(remote[0, 0]) - (1 << 40))
        return len(self.posted) - 1

    def done(self, handle: int) -> bool:
        if handle in self.broken:
            raise TransferError("NIXL: the transfer has failed")
        return handle in self.arrived

    def notify(self, name: str, message: bytes) -> None:
        if self.refuses == "notify":
            raise TransferError("NIXL: no")
        self.notified.extend(ID.unpack(message))


@pytest.fixture
def agent() -> Agent:
    return Agent()


@pytest.fixture
def moves(agent: Agent) -> Moves:
    return Moves(agent, "there", BASES, BASES)  # type: ignore[arg-type]


@pytest.fixture
def begin(moves: Moves) -> Callable[..., Job]:
    def begin(transfer_id: int, target: int, length: int) -> Job:
        segments = np.array([[0, 0, 0, target, length]], dtype=np.int64)
        job = Job(
            transfer_id=transfer_id, peer="p", segments=segments, num_bytes=length, tag=b"", deadline=1.0
        )
        moves.begin(job)
        return job

    return begin


def ends(moves: Moves) -> list[tuple[int, bool]]:
    """Transfers that ended before nothing went on any more, and whether without a COMMIT."""
    found = []
    moving = True
    while moving:
        ended, moving = moves.work()
        found += [(move.job.transfer_id, move.void) for move in ended]
    return found


def test_jobs_that_write_apart_go_together_and_end_in_order(
    agent: Agent, moves: Moves, begin: Callable[..., Job]
) -> None:
    begin(1, 0, 100)
    begin(2, 100, 100)
    assert ends(moves) == []
    assert agent.posted == [0, 100]
    agent.arrived = {1}
    assert ends(moves) == []
    assert agent.notified == []
    agent.arrived = {0, 1}
    assert ends(moves) == [(1, False), (2, False)]
    assert agent.notified == [1, 2]


def test_what_writes_the_same_byte_waits(agent: Agent, moves: Moves, begin: Callable[..., Job]) -> None:
    begin(1, 0, 100)
    begin(2, 99, 100)
    begin(3, 500, 1)
    ends(moves)
    ends(moves)
    assert agent.posted == [0]
    agent.arrived = {0}
    assert ends(moves) == [(1, False)]
    assert agent.posted == [0, 99, 500]


def test_what_has_ended_is_told_before_more_is_posted_and_that_a_slice_at_a_time(
    agent: Agent, moves: Moves, begin: Callable[..., Job]
) -> None:
    begin(1, 0, 2 * SLICE_BYTES)
    begin(2, 2 * SLICE_BYTES, 100)
    posted = []
    for _ in range(3):
        assert moves.work() == ([], True)
        posted.append(len(agent.posted))
    assert posted == [1, 2, 3]
    begin(3, 3 * SLICE_BYTES, 100)
    agent.arrived = {0, 1}
    ended, moving = moves.work()
    assert ([move.job.transfer_id for move in ended], moving) == ([1], True)
    assert len(agent.posted) == 3
    assert moves.work() == ([], True)
    assert agent.posted[3] == 3 * SLICE_BYTES


def test_large_jobs_are_posted_in_slices_and_only_so_many_at_a_time(
    agent: Agent, moves: Moves, begin: Callable[..., Job]
) -> None:
    begin(1, 0, (MAX_SLICES + 2) * SLICE_BYTES)
    ends(moves)
    assert agent.posted == [i * SLICE_BYTES for i in range(MAX_SLICES)]
    agent.arrived = {0, 3}
    ends(moves)
    assert len(agent.posted) == MAX_SLICES + 2
    agent.arrived = set(range(MAX_SLICES + 2))
    assert ends(moves) == [(1, False)]


def test_an_abandoned_job_posts_no_more_and_is_settled_when_nothing_is_in_flight(
    agent: Agent, moves: Moves, begin: Callable[..., Job]
) -> None:
    job = begin(1, 0, (MAX_SLICES + 2) * SLICE_BYTES)
    ends(moves)
    assert moves.abandon(job)
    assert not moves.settled
    agent.arrived = set(range(MAX_SLICES - 1))
    assert ends(moves) == []
    assert not moves.settled
    agent.arrived = set(range(MAX_SLICES))
    assert ends(moves) == [(1, True)]
    assert moves.settled
    assert not moves.abandon(job)
    assert (len(agent.posted), agent.notified) == (MAX_SLICES, [])


@pytest.mark.parametrize("how", ["a transfer", "write", "notify"])
def test_one_failure_fails_all_and_what_is_in_flight_is_waited_for(
    agent: Agent, moves: Moves, begin: Callable[..., Job], how: str
) -> None:
    begin(1, 0, 10)
    begin(2, 10, 10)
    ends(moves)
    begin(3, 20, 10)
    if how == "a transfer":
        agent.broken = {0}
    else:
        agent.refuses = how
        agent.arrived = {0} if how == "notify" else set()
    first = ends(moves)
    assert moves.failure is not None
    assert first == ([] if how == "write" else [(1, True)])
    assert not moves.settled
    agent.arrived = {0, 1, 2}
    assert ends(moves)[-1][0] in (2, 3)
    while len(moves):
        assert all(void for _, void in ends(moves))
    assert moves.settled
    assert agent.notified == []
