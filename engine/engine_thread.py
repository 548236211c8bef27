"""The thread that an engine lives on: it is loaded, run and closed there, one call at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from .base import Engine, LayerHook, StepPlan, StepResult

T = TypeVar("T")


class EngineThread:
    """One thread, so that an engine sees the same one for its whole life (OpenMP keeps a pool of workers for
    each thread that ever called it)."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")

    async def call(self, function: Callable[[], T]) -> T:
        """Runs a function there. Cancelled, the call goes on but nobody waits for it."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, function)

    async def execute(self, engine: Engine, plan: StepPlan, on_layer: LayerHook | None) -> StepResult:
        """One step of `engine`."""
        return await asyncio.get_running_loop().run_in_executor(
            self._executor, engine.execute, plan, on_layer
        )

    def close(self) -> None:
        """Waits for the call that runs, if any, and ends the thread. Idempotent."""
        self._executor.shutdown(wait=True, cancel_futures=True)
