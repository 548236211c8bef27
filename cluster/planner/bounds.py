"""What no schedule can beat: floors of TTFT and TPOT of a request that is alone, and rates that no worker can
serve in the long run. They say why an objective is infeasible, and spare simulations whose end is known.

Knows step times and lengths; nothing of pools.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ...router.step_time import StepShape, StepTime
from ..load.search import TARGET
from .sim_workload import Lengths

MOST_BATCH = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Floor:
    """The quickest that a phase can be, for the requests of a workload."""

    quantile_ms: float
    """At least 90 % of the requests need no more than this, and no deployment gives it to more."""
    tokens: int
    """Length of a request at that quantile: of its prompt, or its context."""
    feasible: float
    """Share of the requests whose floor is inside the objective."""


def chunk_times(step_time: StepTime, prompt: int, chunk: int) -> list[tuple[float, ...]]:
    """Stage times of the steps of a prompt that is alone."""
    times: list[tuple[float, ...]] = []
    for done in range(0, prompt, chunk):
        tokens = min(chunk, prompt - done)
        times.append(
            step_time.stage_s(StepShape(prefill_tokens=tokens, prefill_context=tokens * (done + tokens / 2)))
        )
    return times


def lone_prefill_s(step_time: StepTime, prompt: int, chunk: int) -> float:
    """From arrival to the first token: chunks may follow each other through the stages, the last goes through
    all of them."""
    times = chunk_times(step_time, prompt, chunk)
    return sum(stages[0] for stages in times) + sum(times[-1][1:])


def lone_token_s(step_time: StepTime, prompt: int, output: int) -> float:
    """Mean time of a token after the first."""
    if output < 2:
        return 0.0
    return step_time.step_s(StepShape(decode_batch=1, decode_context=prompt + (output + 1) / 2))


def ttft_floor(step_time: StepTime, lengths: Lengths, chunk: int, ttft_ms: float) -> Floor:
    """Of computing each prompt alone."""
    known = {prompt: lone_prefill_s(step_time, prompt, chunk) * 1e3 for prompt, _ in lengths}
    return _floor([(known[prompt], prompt) for prompt, _ in lengths], ttft_ms)


def tpot_floor(step_time: StepTime, lengths: Lengths, tpot_ms: float) -> Floor:
    """Of decoding each request alone."""
    return _floor(
        [(lone_token_s(step_time, prompt, output) * 1e3, prompt + output // 2) for prompt, output in lengths],
        tpot_ms,
    )


def fitting(lengths: Lengths, kv_tokens: int) -> float:
    """Share of the requests that a worker with room for so many tokens can hold to their end."""
    return sum(prompt + output <= kv_tokens for prompt, output in lengths) / len(lengths)


def _floor(times: Sequence[tuple[float, int]], objective_ms: float) -> Floor:
    ordered = sorted(times)
    quantile_ms, tokens = ordered[max(0, math.ceil(TARGET * len(ordered)) - 1)]
    return Floor(
        quantile_ms=quantile_ms,
        tokens=tokens,
        feasible=sum(ms <= objective_ms for ms, _ in ordered) / len(ordered),
    )


def prefill_rate(step_time: StepTime, lengths: Lengths, chunk: int) -> float:
    """Requests/s of one worker that computes prompts in the best batches, without end: of its slowest stage,
    and of 90 % of the requests only, the shortest."""
    per_token = min(
        max(step_time.stage_s(StepShape(prefill_tokens=tokens, prefill_context=tokens * tokens / 2))) / tokens
        for tokens in _batches(chunk)
    )
    return _of_shortest([prompt * per_token for prompt, _ in lengths])


def decode_rate(step_time: StepTime, lengths: Lengths, tpot_ms: float, kv_tokens: int) -> float:
    """Requests/s of one worker that always decodes the largest batch whose steps are inside the objective and
    whose contexts fit its memory; of 90 % of the requests only, those with the fewest tokens.

    For step times that are linear in the batch, no mixture of batches does more work within one mean time.
    """
    decoding = sorted(((output - 1, prompt) for prompt, output in lengths if output > 1))
    if not decoding:
        return math.inf
    steps = sum(output for output, _ in decoding)
    context = sum(output * (prompt + output / 2) for output, prompt in decoding) / steps
    best = 0.0
    for batch in _batches(min(MOST_BATCH, max(1, int(kv_tokens / context)))):
        stages = step_time.stage_s(StepShape(decode_batch=batch, decode_context=batch * context))
        if sum(stages) * 1e3 <= tpot_ms:
            best = max(best, batch / max(stages))
    return _of_shortest([(output - 1) / best for _, output in lengths]) if best else 0.0


def saturating_tokens(step_time: StepTime, most: int) -> int:
    """The smallest power of two that a prefill step computes at four fifths of the best speed: a larger batch
    would only make its first prompt wait (DistServe, OSDI 2024, section 3.1)."""
    speeds = {
        tokens: tokens / max(step_time.stage_s(StepShape(prefill_tokens=tokens))) for tokens in _powers(most)
    }
    best = max(speeds.values())
    return next(tokens for tokens, speed in speeds.items() if speed >= 0.8 * best)


def _of_shortest(seconds: Sequence[float]) -> float:
    ordered = sorted(seconds)
    total = sum(ordered[: max(1, math.ceil(TARGET * len(ordered)))])
    return len(ordered) / total if total else math.inf


def _powers(most: int) -> list[int]:
    return [1 << i for i in range(most.bit_length()) if 1 << i <= most]


def _batches(most: int) -> list[int]:
    """Up to `most`, with steps of an eighth."""
    found, batch = [], 1
    while batch < most:
        found.append(batch)
        batch += max(1, batch // 8)
    return [*found, most]
