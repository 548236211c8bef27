"""What a running cluster takes for a request and a step beside the engine's own time: lone requests and a
burst, against the step times of a profile.

The cluster has one prefill and one decode worker and nothing else to do.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from statistics import median

import numpy as np

from ..proto.errors import InternalError
from ..router.step_time import StepShape, StepTime
from .load.client import LoadClient, Outcome, RequestResult
from .load.workload import ModelShape, PlannedRequest, WorkloadConfig, plan_load
from .planner.profile import ServingCost
from .planner.profile_fit import robust_fit

LONE_REQUESTS = 12
LONE_SHARES = (0.25, 0.5, 1.0)
"""Prompt lengths, of a step's prompt budget: one step each, of different bytes to hand over."""
OUTPUT_TOKENS = 24
BURST, BESIDE = 8, 4
BURST_PROMPT = 128
BURST_OUTPUT = 64
SALT = 2**31 + 1
"""Of prompts that nobody else sends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What came back."""

    lone: Sequence[RequestResult]
    """One after the other."""
    beside: Sequence[RequestResult]
    """The same prompts one after the other, while the decode worker had a batch."""
    burst: Sequence[RequestResult]
    """All at once."""


async def serve_probes(client: LoadClient, model: ModelShape, *, chunk_budget: int) -> Served:
    """
    Raises:
        InternalError: a request failed.
    """
    longest = min(chunk_budget, model.context_length - OUTPUT_TOKENS - 1)

    async def one_by_one(salt: int, output: int) -> list[RequestResult]:
        results: list[RequestResult] = []
        for i in range(LONE_REQUESTS):
            length = max(1, round(longest * LONE_SHARES[i % len(LONE_SHARES)]))
            # Sent alone: what is measured is no queue.
            results += await client.run_one_by_one(_plan(model, 1, length, output, salt + i))
        return results

    lone = await one_by_one(SALT, OUTPUT_TOKENS)
    burst = await client.run_open_loop(_plan(model, BURST, BURST_PROMPT, BURST_OUTPUT, SALT + 100))

    async def decode_on() -> None:
        for salt in count(SALT + 1000):
            output = model.context_length // 2
            await client.run_open_loop(_plan(model, BESIDE, BURST_PROMPT, output, salt))

    decoding = asyncio.create_task(decode_on())
    try:
        beside = await one_by_one(SALT + 200, 1)
    finally:
        decoding.cancel()
        await asyncio.wait((decoding,))
    for result in (*lone, *burst, *beside):
        if result.outcome is not Outcome.FINISHED:
            raise InternalError(f"a request of the profile ended as {result.outcome}: {result.detail}")
    warm = len(LONE_SHARES)  # the first of each length warm up
    return Served(lone=lone[warm:], beside=beside[warm:], burst=burst)


def cost_of(served: Served, step_time: StepTime) -> ServingCost:
    """
    Args:
        step_time: of the machine as fast as it was meanwhile.

    Raises:
        InternalError: nothing was handed over, or too few tokens came.
    """
    lone, burst = served.lone, served.burst
    handed = [r for r in lone if r.handoff_bytes]
    if not handed:
        raise InternalError(
            "no request of the profile was handed over from a prefill to a decode worker; are both there?"
        )
    alone = median(_decode_excess([r], 1, step_time) for r in lone)
    together = _decode_excess(burst, len(burst), step_time)
    bytes_s = np.array([(r.stages["handoff_ms"] / 1000.0, r.handoff_bytes) for r in handed])
    latency, per_byte = robust_fit(
        np.column_stack((np.ones(len(handed)), bytes_s[:, 1])), np.maximum(bytes_s[:, 0], 1e-6)
    )
    per_sequence = (together - alone) / (len(burst) - 1) if len(burst) > 1 else 0.0
    first_token_s = median(map(_around_first_token_s, lone))
    return ServingCost(
        first_token_s=first_token_s,
        first_token_beside_s=max(first_token_s, median(map(_around_first_token_s, served.beside))),
        step_s=max(0.0, alone - max(0.0, per_sequence)),
        step_per_sequence_s=max(0.0, per_sequence),
        handoff_s=float(latency),
        handoff_bytes_per_s=1.0 / float(per_byte) if per_byte > 0.0 else float("inf"),
    )


def _around_first_token_s(result: RequestResult) -> float:
    return max(0.0, _ttft_ms(result) - result.stages["prefill_ms"]) / 1000.0


def _ttft_ms(result: RequestResult) -> float:
    assert result.ttft_ms is not None  # it finished
    return result.ttft_ms - result.lateness_ms


def _decode_excess(results: Sequence[RequestResult], batch: int, step_time: StepTime) -> float:
    """Median seconds between tokens beyond the step's own time, while all of `results` decode."""
    begin = max(r.token_s[2] for r in results)  # the first decode step may wait for a hand-off
    end = min(r.token_s[-1] for r in results)
    first = results[0]
    context = sum(r.prompt_tokens for r in results)
    excess = []
    for i, (before, after) in enumerate(zip(first.token_s, first.token_s[1:], strict=False)):
        if begin <= before and after <= end:
            shape = StepShape(decode_batch=batch, decode_context=context + batch * (i + 1))
            excess.append(after - before - step_time.step_s(shape))
    if not excess:
        raise InternalError("the requests of the profile did not decode together; is the cluster busy?")
    return median(excess)


def _plan(model: ModelShape, count: int, prompt: int, output: int, salt: int) -> list[PlannedRequest]:
    """All at once."""
    workload = WorkloadConfig(num_requests=count, mean_input=prompt, mean_output=output)
    return plan_load(workload, [], model, 1e5, salt)
