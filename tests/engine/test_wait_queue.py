"""Who waits is served in order, can leave at any time, and is forgotten when it has."""

from __future__ import annotations

import random

from diphase.engine.sequence import Sequence
from diphase.engine.wait_queue import SLACK, WaitQueue, rank
from diphase.proto.slo import Priority

from .sequences import make_sequence


def drain(queue: WaitQueue) -> list[Sequence]:
    order = []
    while head := queue.head():
        order.append(head)
        queue.remove(head.key)
    return order


def test_order_is_priority_then_arrival_whatever_comes_and_goes() -> None:
    rng = random.Random(0)
    queue = WaitQueue()
    waiting: list[Sequence] = []
    for i in range(500):
        sequence = make_sequence(
            f"s{i}", rng.randint(1, 50), priority=rng.choice(list(Priority)), arrived_at=rng.random()
        )
        queue.add(sequence)
        waiting.append(sequence)
        if rng.random() < 0.4:
            gone = waiting.pop(rng.randrange(len(waiting)))
            assert queue.remove(gone.key) is gone
            assert queue.remove(gone.key) is None
        assert queue.num_tokens == sum(s.num_tokens for s in waiting)
        assert len(queue) == len(waiting)
    assert drain(queue) == sorted(waiting, key=rank)
    assert queue.num_tokens == 0


def test_a_sequence_may_come_back_before_its_old_place_was_cleared() -> None:
    queue = WaitQueue()
    first, second = make_sequence("a", 5), make_sequence("b", 5, arrived_at=1.0)
    queue.add(first)
    queue.add(second)
    queue.remove(first.key)
    queue.add(first)
    assert drain(queue) == [first, second]


def test_what_left_behind_a_blocked_head_does_not_pile_up() -> None:
    queue = WaitQueue()
    queue.add(make_sequence("head", 5))
    for i in range(10_000):
        sequence = make_sequence(f"s{i}", 1, arrived_at=1.0 + i)
        queue.add(sequence)
        queue.remove(sequence.key)
    assert len(queue._heap) <= SLACK + 4


def test_who_was_lost_with_another_worker_does_not_queue_again() -> None:
    queue = WaitQueue()
    queue.add(make_sequence("here first", 5, arrived_at=7.0))
    retried = make_sequence("retried", 5, arrived_at=8.0)
    retried.waited_s = 3.0
    queue.add(retried)
    assert queue.head() is retried
