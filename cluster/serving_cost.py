"""What a running cluster takes for a request and a step beside the engine's own time, and what its workers
cost each other there: lone requests, and prompts while a batch decodes, against the step times of a profile.

The cluster has one prefill and one decode worker and nothing else to do.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median
from typing import NamedTuple

import numpy as np

from ..proto.errors import InternalError
from ..router.step_time import StepShape, StepTime
from .load.client import LoadClient, Outcome, RequestResult
from .load.workload import ModelShape, PlannedRequest, WorkloadConfig, plan_load
from .planner.profile import ServingCost, Slowdown
from .planner.profile_fit import robust_fit

ROUNDS = 6
"""After one that warms up."""
PROMPT_SHARES = (0.25, 0.5, 1.0)
"""Prompt lengths, of a step's prompt budget: one step each, of different bytes to hand over."""
LONE_OUTPUT = 24
BATCH, BATCH_PROMPT = 8, 128
QUIET_SHARE = 1.0
"""Between two prompts beside the batch, of the time that the first takes alone."""
SALT = 2**31 + 1
"""Of prompts that nobody else sends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What came back in one round."""

    lone: Sequence[RequestResult]
    """One after the other."""
    batch: Sequence[RequestResult]
    """All at once."""
    beside: Sequence[RequestResult]
    """Prompts as those of `lone`, while the batch decodes; their times are of the same clock as its."""
    step_time: StepTime
    """Of the machine as fast as it was meanwhile."""


class _Gap(NamedTuple):
    """Between two tokens of a sequence while a whole batch decodes."""

    begin: float
    end: float
    shape: StepShape


async def serve_rounds(
    client: LoadClient, model: ModelShape, speed: Callable[[], StepTime], *, chunk_budget: int
) -> list[Served]:
    """
    Args:
        speed: step times of the machine as fast as it was since the last call.

    Raises:
        InternalError: a request failed.
    """
    longest = min(chunk_budget, model.context_length // 2)
    lengths = [max(1, round(longest * share)) for share in PROMPT_SHARES]
    rounds: list[Served] = []
    step_time = speed()
    for number in range(ROUNDS + 1):
        salt = SALT + 100 * number
        lone: list[RequestResult] = []
        for i, length in enumerate(lengths):
            # Sent alone: what is measured is no queue.
            lone += await client.run_one_by_one(_plan(model, 1, length, LONE_OUTPUT, salt + i))
        results = await client.run_open_loop(_batch_and_prompts(model, lengths, step_time, salt + 50))
        for result in (*lone, *results):
            if result.outcome is not Outcome.FINISHED:
                raise InternalError(f"a request of the profile ended as {result.outcome}: {result.detail}")
        step_time = speed()
        if number:
            batch, beside = results[:BATCH], results[BATCH:]
            rounds.append(Served(lone=lone, batch=batch, beside=beside, step_time=step_time))
    return rounds


def cost_of(rounds: Sequence[Served]) -> ServingCost:
    """
    Raises:
        InternalError: nothing was handed over, or the batch did not decode together.
    """
    lone = [result for served in rounds for result in served.lone]
    beside = [result for served in rounds for result in served.beside]
    handed = [result for result in lone if result.handoff_bytes]
    if not handed:
        raise InternalError(
            "no request of the profile was handed over from a prefill to a decode worker; are both there?"
        )
    alone = _excess_s(
        [(served.step_time, gap) for served in rounds for r in served.lone for gap in _gaps([r])]
    )
    together = _excess_s([(served.step_time, gap) for served in rounds for gap in _parted(served)[0]])
    bytes_s = np.array([(r.stages["handoff_ms"] / 1000.0, r.handoff_bytes) for r in handed])
    latency, per_byte = robust_fit(
        np.column_stack((np.ones(len(handed)), bytes_s[:, 1])), np.maximum(bytes_s[:, 0], 1e-6)
    )
    per_sequence = max(0.0, (together - alone) / (len(rounds[0].batch) - 1))
    first_token_s = median(map(_around_first_token_s, lone))
    return ServingCost(
        first_token_s=first_token_s,
        first_token_beside_s=max(first_token_s, median(map(_around_first_token_s, beside))),
        step_s=max(0.0, alone - per_sequence),
        step_per_sequence_s=per_sequence,
        handoff_s=float(latency),
        handoff_bytes_per_s=1.0 / float(per_byte) if per_byte > 0.0 else float("inf"),
    )


def slowdown_of(rounds: Sequence[Served], engines: Slowdown) -> Slowdown:
    """What a prefill and a decode worker cost each other in a cluster, where gateway, client and Ray compute
    for both of them, too; at least what bare engines do."""
    prompts, tokens = [1.0], [1.0]
    for served in rounds:
        alone = {result.prompt_tokens: result.stages["prefill_ms"] for result in served.lone}
        prompts += [result.stages["prefill_ms"] / alone[result.prompt_tokens] for result in served.beside]
        quiet, beside = _parted(served)
        if quiet and beside:  # steps may be longer than prompts take
            tokens.append(_ratio(served.step_time, beside) / _ratio(served.step_time, quiet))
    factors = {own: dict(others) for own, others in engines.factors.items()}
    factors["prefill"]["decode"] = max(factors["prefill"]["decode"], median(prompts))
    factors["decode"]["prefill"] = max(factors["decode"]["prefill"], median(tokens))
    return Slowdown(factors=factors)


def _around_first_token_s(result: RequestResult) -> float:
    assert result.ttft_ms is not None  # it finished
    return max(0.0, result.ttft_ms - result.lateness_ms - result.stages["prefill_ms"]) / 1000.0


def _gaps(results: Sequence[RequestResult]) -> list[_Gap]:
    """Between the tokens of the first result, while all of them decode."""
    begin = max(r.token_s[2] for r in results)  # the first decode step may wait for a hand-off
    end = min(r.token_s[-1] for r in results)
    gaps = []
    for before, after in pairwise(results[0].token_s):
        if begin <= before and after <= end:
            context = sum(r.prompt_tokens + bisect_right(r.token_s, before) for r in results)
            gaps.append(_Gap(before, after, StepShape(decode_batch=len(results), decode_context=context)))
    return gaps


def _parted(served: Served) -> tuple[list[_Gap], list[_Gap]]:
    """Gaps of the batch in which no prompt was computed, and those in which one was all the time."""
    spans = list(map(_computed, served.beside))
    gaps = _gaps(served.batch)
    quiet = [gap for gap in gaps if all(gap.end <= begin or end <= gap.begin for begin, end in spans)]
    beside = [gap for gap in gaps if any(begin <= gap.begin and gap.end <= end for begin, end in spans)]
    return quiet, beside


def _computed(result: RequestResult) -> tuple[float, float]:
    """When its prompt was, on the client's clock."""
    stages = result.stages
    begin = (
        result.sent_s + sum(stages[f"{name}_ms"] for name in ("tokenise", "placement", "prefill_queue")) / 1e3
    )
    return begin, begin + stages["prefill_ms"] / 1e3


def _excess_s(gaps: Sequence[tuple[StepTime, _Gap]]) -> float:
    """Median seconds beyond the steps' own time."""
    if not gaps:
        raise InternalError("the requests of the profile did not decode together; is the cluster busy?")
    return median(gap.end - gap.begin - step_time.step_s(gap.shape) for step_time, gap in gaps)


def _ratio(step_time: StepTime, gaps: Sequence[_Gap]) -> float:
    """Median of the gaps over the steps' own time."""
    return median((gap.end - gap.begin) / step_time.step_s(gap.shape) for gap in gaps)


def _plan(model: ModelShape, count: int, prompt: int, output: int, salt: int) -> list[PlannedRequest]:
    """All at once."""
    workload = WorkloadConfig(num_requests=count, mean_input=prompt, mean_output=output)
    return plan_load(workload, [], model, 1e5, salt)


def _batch_and_prompts(
    model: ModelShape, lengths: Sequence[int], step_time: StepTime, salt: int
) -> list[PlannedRequest]:
    """A batch, and then prompts one by one for as long as it decodes, with pauses between them."""
    at = BATCH * _prompt_s(step_time, BATCH_PROMPT) * (1.0 + QUIET_SHARE)
    prompts: list[PlannedRequest] = []
    for i, length in enumerate(lengths):
        (one,) = _plan(model, 1, length, 2, salt + i)
        prompts.append(replace(one, index=BATCH + i, arrival_s=at))
        at += _prompt_s(step_time, length) * (1.0 + QUIET_SHARE)
    step_s = step_time.step_s(StepShape(decode_batch=BATCH, decode_context=BATCH * BATCH_PROMPT))
    output = min(round(at / step_s) + 3, model.context_length - BATCH_PROMPT - 1)
    return [*_plan(model, BATCH, BATCH_PROMPT, output, salt + len(lengths)), *prompts]


def _prompt_s(step_time: StepTime, tokens: int) -> float:
    return step_time.step_s(StepShape(prefill_tokens=tokens, prefill_context=tokens * tokens / 2))
