from __future__ import annotations

import os
import signal
import threading

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
