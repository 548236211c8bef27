"""When a pump is called, in virtual time."""

from __future__ import annotations

import asyncio
import math

from diphase.kv_transfer.pump_timer import PumpTimer

from ..simulation.virtual_loop import VirtualClock, VirtualLoop, run_virtually

INTERVAL_S = 1.0


class Pump:
    """Takes what is due, and is due again INTERVAL_S later."""

    def __init__(self, loop: VirtualLoop) -> None:
        self.loop = loop
        self.clock = VirtualClock(loop)
        self.timer = PumpTimer(self, self.clock)
        self.called_at: list[float] = []
        self.taken_at: list[float] = []
        self.broken: list[Exception] = []
        self.fails = False

    def __call__(self) -> None:
        now = self.clock.now()
        self.called_at.append(now)
        if self.fails:
            raise ValueError("a fault")
        if self.timer.take_due(now):
            self.taken_at.append(now)
            self.timer.arm(now + INTERVAL_S)

    def start(self) -> None:
        self.timer.start(self.broken.append)


def play(*, until_s: float, start_at_s: float | None = 0.0, busy_at_s: float = math.inf) -> Pump:
    """A pump that is armed for 1 s at once, on a loop that is busy for a second from `busy_at_s`, when a
    thread wakes the pump."""

    async def main() -> Pump:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        pump = Pump(loop)

        def stay_busy() -> None:
            pump.timer.wake()
            loop.busy(1.0)

        pump.timer.arm(INTERVAL_S)
        if start_at_s is not None:
            loop.call_at(start_at_s, pump.start)
        if busy_at_s < math.inf:
            loop.call_at(busy_at_s, stay_busy)
        await asyncio.sleep(until_s)
        pump.timer.stop()
        await asyncio.sleep(until_s)
        return pump

    return run_virtually(main())


def test_the_pump_is_called_when_it_is_due_until_it_is_stopped() -> None:
    pump = play(until_s=3.5)
    assert pump.taken_at == [1.0, 2.0, 3.0]
    assert pump.called_at == [0.0, *pump.taken_at], "and once at the start"


def test_a_wake_that_overtakes_the_timer_does_not_take_the_next_deadline_with_it() -> None:
    pump = play(until_s=4.0, busy_at_s=0.5)
    assert pump.taken_at == [1.5, 2.5, 3.5]


def test_what_was_armed_before_the_start_is_kept() -> None:
    assert play(until_s=1.5, start_at_s=0.25).taken_at == [1.0]


def test_what_was_due_before_the_start_is_taken_at_once() -> None:
    assert play(until_s=3.0, start_at_s=1.75).taken_at == [1.75, 2.75]


def test_nobody_calls_a_pump_that_was_not_started() -> None:
    assert play(until_s=3.0, start_at_s=None).called_at == []


def test_a_pump_that_raises_is_reported_once_and_called_no_more() -> None:
    async def main() -> Pump:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        pump = Pump(loop)
        pump.fails = True
        pump.timer.arm(INTERVAL_S)
        pump.start()
        await asyncio.sleep(5.0)
        return pump

    pump = run_virtually(main())
    assert [str(error) for error in pump.broken] == ["a fault"]
    assert pump.called_at == [0.0]


def test_a_later_time_does_not_replace_an_earlier_one() -> None:
    async def main() -> Pump:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        pump = Pump(loop)
        pump.start()
        for due in (2.0, 1.5, 3.0):
            pump.timer.arm(due)
        await asyncio.sleep(2.0)
        pump.timer.stop()
        return pump

    assert run_virtually(main()).taken_at == [1.5]
