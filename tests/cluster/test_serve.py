from __future__ import annotations

import asyncio
import os
import signal
import threading

import pytest
from diphase.cluster.serve import StopSignals


async def test_the_first_signal_is_answered_while_the_event_loop_is_busy_and_the_second_is_not() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    answers: list[str] = []
    answered = threading.Event()

    def answer() -> None:
        answers.append("stopping")
        answered.set()

    stop = StopSignals(answer)
    with stop.installed():
        os.kill(os.getpid(), signal.SIGINT)
        # Keeps the loop waiting, as Ray's start does.
        assert answered.wait(30.0)
        await stop.drain.wait()
        assert not stop.now.is_set()
        os.kill(os.getpid(), signal.SIGTERM)
        await stop.now.wait()
    assert answers == ["stopping"]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.parametrize("error", [BrokenPipeError(), SystemExit(1)])
async def test_an_answer_that_nobody_reads_costs_no_signal(error: BaseException) -> None:
    def answer() -> None:
        raise error

    stop = StopSignals(answer)
    with stop.installed():
        os.kill(os.getpid(), signal.SIGINT)
        await stop.drain.wait()
        os.kill(os.getpid(), signal.SIGINT)
        async with asyncio.timeout(30.0):
            await stop.now.wait()
