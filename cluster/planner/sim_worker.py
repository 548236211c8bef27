"""A worker in virtual time: its own scheduler and block manager, and a latency model instead of an engine.

With p pipeline stages up to p steps are on their way. While a decode batch does not change, a worker with one
stage goes through a *stretch* of steps as one event; settle() cuts it short where somebody comes in between.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from ...decode_workers.scheduler import DecodeScheduler
from ...engine.base import ModelLimits, SampledToken, StepPlan, StepResult
from ...engine.block_manager import BlockManager
from ...engine.block_tables import BlockTables
from ...engine.requests import Outcome
from ...engine.sequence import Sequence
from ...engine.step_predictor import describe
from ...prefill_workers.config import PrefillSchedulerConfig
from ...prefill_workers.scheduler import PrefillScheduler
from ...proto.ids import HandoffKey
from ...router.step_time import StepShape
from .deployment import WorkerSpec
from .events import NS, STEP_ENDS, EventQueue, to_ns

LEAST_STRETCH, MOST_STRETCH = 16, 4096
"""Steps that are summed at once: about twice as many as the last time were done before somebody came in
between."""
FEW = 32
"""Steps that are summed faster one by one."""
FRACTION = 20
"""Bits behind the point of a decode step's nanoseconds: its line is rounded to that once, so that the sum
over a stretch is exact whoever adds it up."""

_TOKEN = SampledToken(token_id=0)


@dataclass(slots=True, eq=False)
class _Stretch:
    """Steps of one batch. `ends[i]` is when step i is done."""

    ends: list[int]
    since: int
    """When the first that is not settled began."""
    settled: int = 0
    """Steps that the scheduler has taken."""

    def done_by(self, now: int) -> int:
        """Steps that are complete and not settled."""
        return bisect_right(self.ends, now) - self.settled


class SimWorker:
    """One process. `on_start` hears of sequences whose step begins, those at least that are in their first
    one here; `on_done` of what a step gave, those at least that are not in a stretch or end somebody;
    `on_outgrown` of those that it gave up, its whole pool being too small for them."""

    def __init__(
        self,
        index: int,
        spec: WorkerSpec,
        block_size: int,
        context_length: int,
        events: EventQueue,
        *,
        name: str,
        exact: bool,
        on_start: Callable[[SimWorker, Seq[Sequence]], None],
        on_done: Callable[[SimWorker, Seq[Outcome]], None],
        on_outgrown: Callable[[SimWorker, Seq[Sequence]], None],
    ) -> None:
        self.index = index
        """Its place in the deployment: whoever comes after it there has it, too."""
        self.name = name
        """What the router calls it: the same when its process comes back."""
        self.spec = spec
        self.alive = True
        self.draining = False
        self.handoffs = 0
        """On their way to it, or from it."""
        self.reserved_blocks = 0
        """That those on their way to it were granted."""
        self.blocks = BlockManager(spec.num_blocks, block_size)
        self.tables = BlockTables(self.blocks, None)
        limits = ModelLimits(
            name="simulated",
            context_length=min(context_length, spec.num_blocks * block_size),
            vocab_size=1,
            eos_token_ids=(),
        )
        self.context_length = limits.context_length
        """Tokens that a request here may have at most."""
        self.prefill: PrefillScheduler | None = None
        self.decode: DecodeScheduler | None = None
        if isinstance(spec.scheduler, PrefillSchedulerConfig):
            self.prefill = PrefillScheduler(spec.scheduler, self.tables, limits)
        else:
            self.decode = DecodeScheduler(spec.scheduler, self.tables, limits)
        self.unscheduled: set[int] = set()
        """Requests here of which no step has begun."""
        self.busy_ns = 0
        """Of the first stage."""
        self.steps = 0
        self._events = events
        self._on_start = on_start
        self._on_done = on_done
        self._on_outgrown = on_outgrown
        self._time = spec.step_time
        self._stretches = not exact and self.decode is not None and spec.step_time.stages == 1
        self._stage_free = [0] * spec.step_time.stages
        self._stretch: _Stretch | None = None
        self._summed = LEAST_STRETCH
        self._taken: list[Sequence] = []  # into the batch, since the last stretch began

    def start(self) -> None:
        """Begins a step if the first stage is free and there is work. To be called whenever there may be."""
        if self._stretch is not None or self._stage_free[0] > self._events.now or not self.alive:
            return
        if self._stretches and self._begin_stretch():
            return
        scheduler = self.prefill or self.decode
        assert scheduler is not None  # one of the two is there
        plan = scheduler.plan()
        if plan is not None:
            self._begin(plan, self._durations(plan))
        if self.decode is not None and (outgrown := self.decode.take_outgrown()):
            self._on_outgrown(self, outgrown)  # even where there is no step: they may have been all

    def settle(self) -> None:
        """Brings the scheduler to this moment: what is done of a stretch is done, and it ends with the step
        that runs. Before anything is added to the worker or taken from its pool."""
        stretch = self._stretch
        if stretch is None:
            return
        assert self.decode is not None  # prefill workers have no stretches
        done = stretch.done_by(self._events.now)
        if stretch.settled + done == len(stretch.ends):
            self._end_stretch(stretch)
            self.settle()  # the next may be a stretch, too
            return
        self._advance(stretch, done)
        self.decode.take_blocks(1)
        if len(stretch.ends) > stretch.settled + 1:
            self._summed = max(LEAST_STRETCH, 2 * stretch.settled)
            self._run_stretch(_Stretch([stretch.ends[stretch.settled]], stretch.since))

    def single_out(self) -> None:
        """As settle(), and brings every sequence up to date: the step that runs is one by itself, which a
        sequence may leave."""
        self.settle()
        stretch, self._stretch = self._stretch, None
        if stretch is None:
            return
        assert self.decode is not None
        [end] = stretch.ends[stretch.settled :]
        self._stage_free[0] = end
        self.steps += 1
        self.busy_ns += end - stretch.since
        self._events.at(end, self._complete, self.decode.steady_plan(), rank=STEP_ENDS)

    def cancel(self, key: HandoffKey) -> None:
        """Forgets an attempt; its blocks are free at once, or at the end of the step that it is in."""
        self.single_out()
        scheduler = self.prefill or self.decode
        assert scheduler is not None
        scheduler.cancel(key)

    def kill(self) -> None:
        """The process is gone: nothing of it happens any more, and the step that runs gives nothing."""
        self.single_out()
        self.alive = False
        self.busy_ns -= max(0, self._stage_free[0] - self._events.now)

    @property
    def idle(self) -> bool:
        """Whether it has nothing that it must finish."""
        if self.prefill is not None:
            busy = self.prefill.num_waiting + self.prefill.num_started
        else:
            assert self.decode is not None
            busy = self.decode.num_waiting + self.decode.num_running
        return not (busy or self.handoffs)

    @property
    def unsettled_steps(self) -> int:
        """Of a stretch, those that the scheduler has not been told of, the one that runs included; 0 where
        there is no stretch."""
        return 0 if self._stretch is None else self._stretch.done_by(self._events.now) + 1

    def take_blocks(self) -> None:
        """Of a stretch up to the step that runs; what it evicts for them can be announced then."""
        if self._stretch is not None:
            assert self.decode is not None
            self.decode.take_blocks(self.unsettled_steps)

    # inside

    def _begin_stretch(self) -> bool:
        """Whether the next steps are one event."""
        decode = self.decode
        assert decode is not None
        self._taken += decode.take_ready()
        steps = min(decode.steady_steps(), self._summed)
        if steps < 1:
            return False
        batch = decode.num_running
        context = decode.running_context + batch  # each with the token that it computes
        now = self._events.now
        ends = accumulate(self._decode_ns(batch, context, steps), initial=now)
        next(ends)
        self._run_stretch(_Stretch(list(ends), now))
        if self._taken:
            self._on_start(self, self._taken)
            self._taken = []
        return True

    def _run_stretch(self, stretch: _Stretch) -> None:
        self._stretch = stretch
        self._events.at(stretch.ends[-1], self._end_stretch, stretch, rank=STEP_ENDS)

    def _end_stretch(self, stretch: _Stretch) -> None:
        if stretch is not self._stretch:
            return  # somebody came in between
        outcomes = self._advance(stretch, len(stretch.ends) - stretch.settled)
        if stretch.settled == self._summed:
            self._summed = min(2 * self._summed, MOST_STRETCH)
        self._stretch = None
        if outcomes:
            self._on_done(self, outcomes)
        self.start()

    def _advance(self, stretch: _Stretch, steps: int) -> list[Outcome]:
        assert self.decode is not None
        if not steps:
            return []
        stretch.settled += steps
        self.steps += steps
        end = stretch.ends[stretch.settled - 1]
        self.busy_ns += end - stretch.since
        stretch.since = end
        return self.decode.advance(steps)

    def _durations(self, plan: StepPlan) -> list[int]:
        """Nanoseconds of each stage."""
        shape = shape_of(plan)
        if self._time.stages == 1 and shape.prefill_tokens == 0:
            return self._decode_ns(shape.decode_batch, round(shape.decode_context), 1)
        return [max(1, to_ns(seconds)) for seconds in self._time.stage_s(shape)]

    def _decode_ns(self, batch: int, context: int, steps: int) -> list[int]:
        """Times of the next steps of a batch that has `context` in the first of them; fewer where the latency
        model's line ends, but one at least."""
        line = self._time.decode_line(batch, context)
        if line.until <= context + (steps - 1) * batch:  # where it ends, the next line begins
            steps = math.ceil((line.until - context) / batch)
        scale = NS << FRACTION
        intercept, slope = round(line.intercept_s * scale), round(line.slope_s * scale)
        first, more = intercept + slope * context, slope * batch
        if steps <= FEW:
            return [max((first + more * i) >> FRACTION, 1) for i in range(steps)]
        times = (first + more * np.arange(steps, dtype=np.int64)) >> FRACTION
        return np.maximum(times, 1).tolist()  # type: ignore[no-any-return]

    def _begin(self, plan: StepPlan, durations: list[int]) -> None:
        at = self._events.now
        for stage, duration in enumerate(durations):
            at = max(at, self._stage_free[stage]) + duration
            self._stage_free[stage] = at
        self.steps += 1
        self.busy_ns += durations[0]
        self._on_start(self, [chunk.sequence for chunk in plan.chunks])
        self._events.at(at, self._complete, plan, rank=STEP_ENDS)
        if len(durations) > 1:
            self._events.at(self._stage_free[0], self.start)

    def _complete(self, plan: StepPlan) -> None:
        if not self.alive:
            return
        tokens = [_TOKEN if chunk.samples else None for chunk in plan.chunks]
        scheduler = self.prefill or self.decode
        assert scheduler is not None
        outcomes = scheduler.complete(plan, StepResult(tokens=list(tokens), duration_s=0.0))
        self._on_done(self, outcomes)
        self.start()


def shape_of(plan: StepPlan) -> StepShape:
    """The plan as its worker would report it."""
    return StepShape.of(describe(plan))
