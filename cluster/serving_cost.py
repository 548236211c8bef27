"""What a running cluster takes for a request and a step beside the engine's own time: lone requests and a
burst, against the step times of a profile.

The cluster has one prefill and one decode worker and nothing else to do.
"""

from __future__ import annotations

from collections.abc import Sequence
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
BURST = 8
BURST_PROMPT = 128
BURST_OUTPUT = 64
SALT = 2**31 + 1
"""Of prompts that nobody else sends."""


async def measure_serving(
    client: LoadClient, model: ModelShape, step_time: StepTime, *, chunk_budget: int
) -> ServingCost:
    """
    Raises:
        InternalError: a request failed, or none was handed over.
    """
    longest = min(chunk_budget, model.context_length - OUTPUT_TOKENS - 1)
    lone: list[RequestResult] = []
    for i in range(LONE_REQUESTS):
        length = max(1, round(longest * LONE_SHARES[i % len(LONE_SHARES)]))
        # Sent alone: what is measured is no queue.
        lone += await client.run_one_by_one(_plan(model, 1, length, OUTPUT_TOKENS, SALT + i))
    burst = await client.run_open_loop(_plan(model, BURST, BURST_PROMPT, BURST_OUTPUT, SALT + LONE_REQUESTS))
    for result in (*lone, *burst):
        if result.outcome is not Outcome.FINISHED:
            raise InternalError(f"a request of the profile ended as {result.outcome}: {result.detail}")
    return cost_of(lone[len(LONE_SHARES) :], burst, step_time)  # the first of each length warm up


def cost_of(
    lone: Sequence[RequestResult], burst: Sequence[RequestResult], step_time: StepTime
) -> ServingCost:
    """
    Raises:
        InternalError: nothing was handed over, or too few tokens came.
    """
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
    return ServingCost(
        first_token_s=median(max(0.0, _ttft_ms(r) - r.stages["prefill_ms"]) for r in lone) / 1000.0,
        step_s=max(0.0, alone - max(0.0, per_sequence)),
        step_per_sequence_s=max(0.0, per_sequence),
        handoff_s=float(latency),
        handoff_bytes_per_s=1.0 / float(per_byte) if per_byte > 0.0 else float("inf"),
    )


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
