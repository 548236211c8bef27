"""The virtual-time loop behaves like a loop whose waiting costs nothing."""

from __future__ import annotations

import asyncio
import random
import time

import pytest

from .virtual_loop import NothingLeftToHappen, VirtualClock, run_virtually


def test_waiting_takes_no_real_time_and_ends_in_order() -> None:
    ended: list[tuple[str, float]] = []

    async def wait(name: str, seconds: float) -> None:
        await asyncio.sleep(seconds)
        ended.append((name, VirtualClock(asyncio.get_running_loop()).now()))

    async def main() -> None:
        await asyncio.gather(wait("day", 86_400.0), wait("second", 1.0), wait("soon", 0.0))

    started = time.monotonic()
    run_virtually(main(), limit_s=1e6)
    assert ended == [("soon", 0.0), ("second", 1.0), ("day", 86_400.0)]
    assert time.monotonic() - started < 60.0


def test_time_does_not_pass_while_something_can_happen() -> None:
    async def main() -> float:
        for _ in range(1000):
            await asyncio.sleep(0)
        return asyncio.get_running_loop().time()

    assert run_virtually(main()) == 0.0


def test_timeouts_are_virtual() -> None:
    async def main() -> float:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(30.0):
                await asyncio.Event().wait()
        return asyncio.get_running_loop().time()

    assert run_virtually(main()) == pytest.approx(30.0)


def test_a_lock_up_is_reported_instead_of_hanging() -> None:
    async def main() -> None:
        await asyncio.Event().wait()

    async def without_limit() -> None:
        await main()

    from .virtual_loop import VirtualLoop

    with asyncio.Runner(loop_factory=VirtualLoop) as runner, pytest.raises(NothingLeftToHappen):
        runner.run(without_limit())


def test_callbacks_from_threads_functions_arrive() -> None:
    async def main() -> list[int]:
        seen: list[int] = []
        asyncio.get_running_loop().call_soon_threadsafe(seen.append, 1)
        await asyncio.sleep(1.0)
        return seen

    assert run_virtually(main()) == [1]


def test_what_is_due_at_a_time_runs_at_that_time_and_not_before() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        rng = random.Random(0)
        due = [rng.random() * 1e6 for _ in range(2000)]
        late: list[float] = []

        def arrive(when: float) -> None:
            late.append(loop.time() - when)

        for when in due:
            loop.call_at(when, arrive, when)
        await asyncio.sleep(1e6)
        assert late == [0.0] * len(due)

    run_virtually(main(), limit_s=1e7)
