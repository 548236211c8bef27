"""The same crash, at any moment of a request's life, under the live router and in the simulator: as many
attempts, and the same end."""

from __future__ import annotations

import asyncio
import math
from typing import NamedTuple

import pytest
from diphase.cluster.planner.deployment import SimulationConfig
from diphase.cluster.planner.incidents import Crash
from diphase.router.config import RouterConfig
from diphase.router.step_time import Line, StepShape

from ...router.fakes import Outcome, fake_cluster, read, start_generation, token_request
from ...simulation.virtual_loop import run_virtually
from .deployments import decode_worker, deployment, prefill_worker, run

PROMPT, TOKENS = 100, 12
PREFILL_S, HANDOFF_S, STEP_S = 0.012, 0.005, 0.02
"""Of the fake workers, which take 2 ms more for the first token after a hand-off."""


class FixedSteps:
    """As the fake workers'."""

    stages = 1

    def stage_s(self, shape: StepShape) -> tuple[float, ...]:
        return (PREFILL_S if shape.prefill_tokens else STEP_S,)

    def step_s(self, shape: StepShape) -> float:
        return sum(self.stage_s(shape))

    def decode_line(self, batch: int, context: float) -> Line:
        return Line(STEP_S, 0.0, math.inf)


class Ended(NamedTuple):
    attempts: int
    tokens: int
    error: str


def live(at_s: float, victim: str, max_attempts: int) -> Ended:
    async def main() -> Ended:
        with fake_cluster(prefill=2, decode=2) as cluster:
            async with cluster.router(max_attempts=max_attempts) as router:
                generation = await start_generation(router, token_request([7] * PROMPT, TOKENS))
                active = generation._stream.active
                asyncio.get_running_loop().call_later(at_s, cluster.workers[victim].kill)
                outcome = await read(generation, Outcome())
                generation.close()
                error = "" if outcome.error is None else outcome.error.code
                return Ended(active.attempt + 1, len(outcome.token_ids), error)

    return run_virtually(main())


def simulated(at_s: float, victim: str, max_attempts: int) -> Ended:
    steps = FixedSteps()
    cluster = deployment(
        prefill_worker(steps=steps, chunk=512),
        prefill_worker(steps=steps, chunk=512),
        decode_worker(steps=steps),
        decode_worker(steps=steps),
        bandwidth=math.inf,
        latency_s=HANDOFF_S,
    )
    config = SimulationConfig(router=RouterConfig(max_attempts=max_attempts))
    crash = Crash(at_s=at_s, worker={"p0": 0, "d0": 2}[victim], noticed_after_s=0.0)
    (request,) = run(cluster, [(0, PROMPT, TOKENS)], config, incidents=[crash])[1].requests
    return Ended(request.attempts, TOKENS if request.last_token >= 0 else -1, request.error)


@pytest.mark.parametrize("max_attempts", [1, 3])
@pytest.mark.parametrize("victim", ["p0", "d0"])
def test_a_crash_costs_as_many_attempts_as_it_does_live(victim: str, max_attempts: int) -> None:
    """While the prompt is computed, while its KV is on its way, before the first token after it, while tokens
    come, and when they have all come."""
    seen = set()
    for at_s in (0.004, 0.015, 0.025, 0.05, 0.15, 0.5):
        found, expected = simulated(at_s, victim, max_attempts), live(at_s, victim, max_attempts)
        assert (found.attempts, found.error) == (expected.attempts, expected.error), at_s
        if not expected.error:
            assert found.tokens == expected.tokens == TOKENS
        seen.add((expected.attempts, expected.error))
    assert len(seen) == 2  # some crashes cost an attempt, or the request, and some nothing
