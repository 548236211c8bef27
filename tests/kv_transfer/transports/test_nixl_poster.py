"""The thread that posts: one call at a time, and every outcome to who asked."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from diphase.kv_transfer.transports.nixl_poster import Poster
from diphase.proto.errors import TransferError

PATIENCE_S = 20.0


class Bench:
    def __init__(self) -> None:
        self.stirred = threading.Semaphore(0)
        self.poster = Poster(self.stirred.release)
        self.outcomes: list[Any] = []

    def outcome(self) -> Any:
        assert self.stirred.acquire(timeout=PATIENCE_S)
        assert self.poster.take()
        return self.outcomes.pop()


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.poster.close()
    assert "kv-nixl-posts" not in {thread.name for thread in threading.enumerate()}


def test_it_is_busy_until_the_outcome_was_taken(bench: Bench) -> None:
    go_on = threading.Event()

    def call() -> str:
        assert go_on.wait(PATIENCE_S)
        return "handle"

    assert bench.poster.take(), "nothing to wait for"
    bench.poster.submit(call, bench.outcomes.append)
    assert not bench.poster.take()
    assert (bench.poster.is_busy, bench.poster.has_outcome) == (True, False)
    go_on.set()
    assert bench.outcome() == "handle"
    assert not bench.poster.is_busy


def test_a_failed_transfer_is_an_outcome_and_a_crash_is_raised(bench: Bench) -> None:
    error = TransferError("NIXL: no")

    def fails(error: Exception) -> None:
        raise error

    bench.poster.submit(lambda: fails(error), bench.outcomes.append)
    assert bench.outcome() is error
    bench.poster.submit(lambda: fails(ZeroDivisionError()), bench.outcomes.append)
    assert bench.stirred.acquire(timeout=PATIENCE_S)
    with pytest.raises(ZeroDivisionError):
        bench.poster.take()


def test_close_waits_for_the_call_at_hand_and_keeps_nothing_of_it(bench: Bench) -> None:
    called = []
    bench.poster.submit(lambda: called.append(1), bench.outcomes.append)
    bench.poster.close()
    assert called == [1]
    assert not bench.poster.has_outcome
    assert not bench.poster.is_busy
    assert bench.outcomes == []
