"""A worker in virtual time: its own scheduler and block manager, and a latency model instead of an engine.

With p pipeline stages up to p steps are on their way. While a decode batch does not change, a worker with one
stage goes through a *stretch* of steps as one event; settle() ends it where somebody comes in between.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...decode_workers.scheduler import DecodeScheduler
from ...engine.base import ModelLimits, SampledToken, StepPlan, StepResult
from ...engine.block_manager import BlockManager
from ...engine.block_tables import BlockTables
from ...engine.requests import Outcome
from ...engine.step_predictor import describe
from ...prefill_workers.config import PrefillSchedulerConfig
from ...prefill_workers.scheduler import PrefillScheduler
from ...router.step_time import StepShape
from .deployment import WorkerSpec
from .events import NS, STEP_ENDS, EventQueue, to_ns

MAX_STRETCH = 4096
"""Steps that are summed at once."""
FRACTION = 20
"""Bits behind the point of a decode step's nanoseconds: its line is rounded to that once, so that the sum
over a stretch is exact whoever adds it up."""

_TOKEN = SampledToken(token_id=0)


@dataclass(slots=True, eq=False)
class _Stretch:
    """Steps of one batch. `ends[i]` is when step i of those not settled is done."""

    ends: NDArray[np.int64]
    serial: int
    since: int
    """When the first that is not settled began."""
    settled: int = 0

    def done_by(self, now: int) -> int:
        """Steps that are complete and not settled."""
        return int(self.ends.searchsorted(now, side="right")) - self.settled


class SimWorker:
    """`on_plan` hears of each step that begins, `on_done` of what one gave."""

    def __init__(
        self,
        index: int,
        spec: WorkerSpec,
        block_size: int,
        context_length: int,
        events: EventQueue,
        *,
        exact: bool,
        on_plan: Callable[[SimWorker, StepPlan], None],
        on_done: Callable[[SimWorker, Sequence[Outcome]], None],
    ) -> None:
        self.index = index
        self.spec = spec
        self.blocks = BlockManager(spec.num_blocks, block_size)
        self.tables = BlockTables(self.blocks, None)
        limits = ModelLimits(
            name="simulated",
            context_length=min(context_length, spec.num_blocks * block_size),
            vocab_size=1,
            eos_token_ids=(),
        )
        self.prefill: PrefillScheduler | None = None
        self.decode: DecodeScheduler | None = None
        if isinstance(spec.scheduler, PrefillSchedulerConfig):
            self.prefill = PrefillScheduler(spec.scheduler, self.tables, limits)
        else:
            self.decode = DecodeScheduler(spec.scheduler, self.tables, limits)
        self.unscheduled: set[int] = set()
        """Requests here of which no step has begun: their first is a step by itself, for on_plan to see."""
        self.busy_ns = 0
        """Of the first stage."""
        self.steps = 0
        self._events = events
        self._on_plan = on_plan
        self._on_done = on_done
        self._time = spec.step_time
        self._stretches = not exact and self.decode is not None and spec.step_time.stages == 1
        self._stage_free = [0] * spec.step_time.stages
        self._stretch: _Stretch | None = None
        self._serial = 0

    def start(self) -> None:
        """Begins a step if the first stage is free and there is work. To be called whenever there may be."""
        if self._stretch is not None or self._stage_free[0] > self._events.now:
            return
        if self._stretches and self._begin_stretch():
            return
        scheduler = self.prefill or self.decode
        assert scheduler is not None  # one of the two is there
        plan = scheduler.plan()
        if plan is not None:
            self._begin(plan, self._durations(plan))

    def settle(self) -> None:
        """Brings the scheduler to this moment: what is done of a stretch is done, and the step that runs is
        one by itself. Before anything is added to the worker or taken from its pool."""
        stretch = self._stretch
        if stretch is None:
            return
        assert self.decode is not None  # prefill workers have no stretches
        done = stretch.done_by(self._events.now)
        self._advance(stretch, done)
        self._stretch = None
        if stretch.settled == len(stretch.ends):
            self.start()
            self.settle()  # the next may be a stretch, too
            return
        plan = self.decode.plan()
        assert plan is not None  # the batch is steady
        end = int(stretch.ends[stretch.settled])
        self._stage_free[0] = end
        self.steps += 1
        self.busy_ns += end - stretch.since
        self._on_plan(self, plan)
        self._events.at(end, self._complete, plan, rank=STEP_ENDS)

    # what load reports, as of the last complete step

    @property
    def running_context(self) -> int:
        assert self.decode is not None
        return self.decode.running_context + self._ahead() * self.decode.num_running

    @property
    def usable_blocks(self) -> int:
        """Free or only cached."""
        if self._stretch is None:
            return self.blocks.available
        assert self.decode is not None
        return self.blocks.available - self.decode.blocks_to_advance(self._ahead() + 1)

    # inside

    def _ahead(self) -> int:
        return 0 if self._stretch is None else self._stretch.done_by(self._events.now)

    def _begin_stretch(self) -> bool:
        """Whether the next steps are one event."""
        decode = self.decode
        assert decode is not None
        if self.unscheduled:
            return False
        steps = min(decode.steady_steps(), MAX_STRETCH)
        if steps < 2:
            return False
        batch = decode.num_running
        context = decode.running_context + batch  # each with the token that it computes
        times = self._decode_ns(batch, context, steps)
        self._serial += 1
        self._stretch = _Stretch(self._events.now + times.cumsum(), self._serial, self._events.now)
        end = int(self._stretch.ends[-1])
        self._events.at(end, self._end_stretch, self._serial, rank=STEP_ENDS)
        return True

    def _end_stretch(self, serial: int) -> None:
        stretch = self._stretch
        if stretch is None or stretch.serial != serial:
            return  # somebody came in between
        self._advance(stretch, len(stretch.ends) - stretch.settled)
        self._stretch = None
        self.start()

    def _advance(self, stretch: _Stretch, steps: int) -> None:
        assert self.decode is not None
        if steps:
            self.decode.advance(steps)
            stretch.settled += steps
            self.steps += steps
            end = int(stretch.ends[stretch.settled - 1])
            self.busy_ns += end - stretch.since
            stretch.since = end

    def _durations(self, plan: StepPlan) -> list[int]:
        """Nanoseconds of each stage."""
        shape = shape_of(plan)
        if self._time.stages == 1 and shape.prefill_tokens == 0:
            return [int(self._decode_ns(shape.decode_batch, round(shape.decode_context), 1)[0])]
        return [max(1, to_ns(seconds)) for seconds in self._time.stage_s(shape)]

    def _decode_ns(self, batch: int, context: int, steps: int) -> NDArray[np.int64]:
        """Times of the next steps of a batch that has `context` in the first of them; fewer where the latency
        model's line ends, but one at least."""
        line = self._time.decode_line(batch, context)
        if line.until <= context + (steps - 1) * batch:  # where it ends, the next line begins
            steps = math.ceil((line.until - context) / batch)
        scale = NS << FRACTION
        intercept, slope = round(line.intercept_s * scale), round(line.slope_s * scale)
        contexts = context + batch * np.arange(steps, dtype=np.int64)
        times: NDArray[np.int64] = np.maximum((intercept + slope * contexts) >> FRACTION, 1)
        return times

    def _begin(self, plan: StepPlan, durations: list[int]) -> None:
        at = self._events.now
        for stage, duration in enumerate(durations):
            at = max(at, self._stage_free[stage]) + duration
            self._stage_free[stage] = at
        self.steps += 1
        self.busy_ns += durations[0]
        self._on_plan(self, plan)
        self._events.at(at, self._complete, plan, rank=STEP_ENDS)
        if len(durations) > 1:
            self._events.at(self._stage_free[0], self.start)

    def _complete(self, plan: StepPlan) -> None:
        tokens = [_TOKEN if chunk.samples else None for chunk in plan.chunks]
        scheduler = self.prefill or self.decode
        assert scheduler is not None
        outcomes = scheduler.complete(plan, StepResult(tokens=list(tokens), duration_s=0.0))
        self._on_done(self, outcomes)
        self.start()


def shape_of(plan: StepPlan) -> StepShape:
    """The plan as its worker would report it."""
    sample = describe(plan)
    return StepShape(
        sample.prefill_tokens, sample.prefill_context, sample.decode_batch, sample.decode_context
    )
