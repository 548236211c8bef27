"""How much of a worker each kind of request keeps busy: the numbers that a fleet is packed by.

Requests are put into buckets: for prefill by prompt length, for decode by context, for colocated workers by
both (Mélange's). A bucket's time on a worker follows from step times, in the best batches that its objective
allows; how much of that a real queue leaves is taken from the worker's simulated goodput. Knows no fleets.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ...router.step_time import StepShape, StepTime
from ..load.search import TARGET
from .bounds import MOST_BATCH, chunk_times, lone_prefill_s, lone_token_s, saturating_tokens
from .fleet import GpuType
from .goodput import Objectives
from .phase_rates import PhaseRates
from .placement import Kind
from .sim_workload import Lengths

USUAL_SHARE = 0.5
"""Of its best rate that a worker serves within the objectives, where no simulation says."""
BETTER_BATCHES = 1.25
"""How much quicker than in the batches assumed here a bucket may at best be computed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """Requests of similar lengths."""

    share: float
    """Of all requests."""
    prompt: int
    """Mean tokens."""
    output: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedKind:
    """A kind of worker on one type, and what the buckets of its role are to it."""

    gpu: GpuType
    worker: Kind
    loads: tuple[float, ...]
    """Workers that each bucket keeps busy at one request/s of all; infinite where it misses the objective."""
    times: tuple[float, ...]
    """Seconds of a worker that a request of each bucket takes at the least."""
    bound: float
    """Requests/s of the whole mixture that one worker cannot exceed."""

    def stands_for(self, other: LoadedKind) -> bool:
        """Whether as many GPUs of this kind carry whatever the other does."""
        times, rest = divmod(other.worker.parallel.gpus, self.worker.parallel.gpus)
        return not rest and all(
            mine <= times * its for mine, its in zip(self.loads, other.loads, strict=True)
        )


def buckets(lengths: Lengths, role: str) -> list[Bucket]:
    """Of lengths within a factor of two; of completions on colocated workers within four."""
    members: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for prompt, output in lengths:
        context = prompt + output // 2 if role == "decode" else prompt
        second = output.bit_length() // 2 if role == "colocated" else 0
        members.setdefault((context.bit_length(), second), []).append((prompt, output))
    return [
        Bucket(
            share=len(pairs) / len(lengths),
            prompt=max(1, round(sum(prompt for prompt, _ in pairs) / len(pairs))),
            output=max(1, round(sum(output for _, output in pairs) / len(pairs))),
        )
        for _, pairs in sorted(members.items())
    ]


def load_kinds(
    gpus: Mapping[str, GpuType],
    phases: Mapping[str, PhaseRates],
    lengths: Lengths,
    objectives: Objectives,
    role: str,
) -> list[LoadedKind]:
    """Every kind of worker of the role that is worth having, over all types; empty when the workload has more
    requests than may miss their objectives whatever serves them.

    Args:
        phases: what is known of each type's workers, by the type's name.
    """
    parts = buckets(lengths, role)
    found: list[tuple[GpuType, Kind, list[float], list[bool]]] = []
    for name, known in phases.items():
        for kind, bound in known.bounds.items():
            if kind.role != role or (bound > 0.0 and not known.rates.get(kind, 0.0)):
                continue  # known to be far from the best, or to serve nothing
            times, able = _times(gpus[name], kind, parts, objectives)
            if any(able):
                found.append((gpus[name], kind, times, able))
    anyone = [any(able[i] for *_, able in found) for i in range(len(parts))]
    if not found or sum(b.share for b, can in zip(parts, anyone, strict=True) if can) < TARGET:
        return []
    usual = min(_shares(found, phases, parts), default=USUAL_SHARE)
    kinds = []
    for gpu, kind, times, able in found:
        known = phases[gpu.name]
        busy = math.fsum(bucket.share * time for bucket, time in zip(parts, times, strict=True))
        rate = known.rates.get(kind) or usual / busy
        # What nobody serves in time is computed all the same, by whoever it meets.
        loads = tuple(
            bucket.share * time / (rate * busy) if can or not other else math.inf
            for bucket, time, can, other in zip(parts, times, able, anyone, strict=True)
        )
        bound = known.bounds[kind] or BETTER_BATCHES / busy
        kinds.append(LoadedKind(gpu=gpu, worker=kind, loads=loads, times=tuple(times), bound=bound))
    return list(_worth_having(kinds))


def _shares(
    found: Sequence[tuple[GpuType, Kind, list[float], list[bool]]],
    phases: Mapping[str, PhaseRates],
    parts: Sequence[Bucket],
) -> Iterator[float]:
    """Of its best rate that each simulated kind serves."""
    for gpu, kind, times, _ in found:
        if rate := phases[gpu.name].rates.get(kind):
            yield rate * math.fsum(b.share * time for b, time in zip(parts, times, strict=True))


def _worth_having(kinds: Sequence[LoadedKind]) -> Iterator[LoadedKind]:
    """Without those that others of the same type stand for: the packing cannot get worse by it."""
    kept: list[LoadedKind] = []
    for kind in sorted(kinds, key=lambda k: (k.gpu.name, k.worker.parallel.gpus, sum(k.loads))):
        if not any(k.gpu is kind.gpu and k.stands_for(kind) for k in kept):
            kept.append(kind)
            yield kind


def rate_bound(kinds: Sequence[tuple[LoadedKind, int]], lengths: Lengths) -> float:
    """Requests/s that so many workers of each kind cannot exceed, even if each does what it is best at and
    the tenth of the requests that takes most goes without.

    For any prices of the buckets, a second of a worker earns at most its dearest bucket's price over its time
    there, and a request/s has to earn the mean price; the prices tried are each kind's own times.
    """
    parts = buckets(lengths, kinds[0][0].worker.role)
    best = math.inf
    for reference, _ in kinds:
        prices = reference.times
        mean = _of_cheapest([(price, bucket.share) for price, bucket in zip(prices, parts, strict=True)])
        earned = 0.0
        for kind, count in kinds:
            whole = math.fsum(bucket.share * time for bucket, time in zip(parts, kind.times, strict=True))
            ratio = max(price / time for price, time in zip(prices, kind.times, strict=True))
            earned += count * kind.bound * whole * ratio
        everything = math.fsum(b.share * price for b, price in zip(parts, prices, strict=True))
        best = min(best, earned / (everything if len(kinds) == 1 else mean))
    return best


def _of_cheapest(priced: list[tuple[float, float]]) -> float:
    """Mean price of the requests when a tenth, the dearest, may go without."""
    left, total = TARGET, 0.0
    for price, share in sorted(priced):
        total += price * min(left, share)
        left = max(0.0, left - share)
    return total


def _times(
    gpu: GpuType, kind: Kind, parts: Sequence[Bucket], objectives: Objectives
) -> tuple[list[float], list[bool]]:
    """(seconds of a worker for a request of each bucket, whether it is then inside its objectives)."""
    step_time, room = gpu.machine.step_time(kind.parallel), gpu.machine.kv_tokens(kind.parallel)
    times: list[float] = []
    able: list[bool] = []
    chunk = gpu.machine.limits.chunk_budget
    for bucket in parts:
        seconds, inside = 0.0, bucket.prompt + bucket.output <= room
        if kind.role != "decode":
            lone_ms = lone_prefill_s(step_time, bucket.prompt, chunk) * 1e3
            inside = inside and lone_ms <= objectives.ttft_ms
            seconds += prompt_seconds(step_time, bucket.prompt, chunk)
        if kind.role != "prefill":
            lone_ms = lone_token_s(step_time, bucket.prompt, bucket.output) * 1e3
            fast = lone_ms <= objectives.tpot_ms
            inside = inside and fast
            seconds += tokens_seconds(step_time, bucket, objectives.tpot_ms if fast else math.inf, room)
        times.append(max(seconds, 1e-9))  # one that only has its first token takes nothing of decode
        able.append(inside)
    return times, able


def prompt_seconds(step_time: StepTime, prompt: int, chunk: int) -> float:
    """Of a prompt among others as long, as many at once as saturate a worker; of its slowest stage."""
    at_once = saturating_tokens(step_time, chunk) // prompt
    if at_once < 2:
        return math.fsum(max(stages) for stages in chunk_times(step_time, prompt, chunk))
    shape = StepShape(prefill_tokens=at_once * prompt, prefill_context=at_once * prompt * prompt / 2)
    return max(step_time.stage_s(shape)) / at_once


def tokens_seconds(step_time: StepTime, bucket: Bucket, tpot_ms: float, room: int) -> float:
    """Of a completion after its first token, in the largest batch whose steps are inside the objective and
    whose contexts fit the memory; of the slowest stage."""
    steps = bucket.output - 1
    if not steps:
        return 0.0
    context = bucket.prompt + bucket.output / 2
    per_token, batch = math.inf, 1
    most = max(1, min(MOST_BATCH, int(room / context)))
    while batch <= most:
        stages = step_time.stage_s(StepShape(decode_batch=batch, decode_context=batch * context))
        if batch > 1 and sum(stages) * 1e3 > tpot_ms:
            break
        per_token = min(per_token, max(stages) / batch)
        batch += max(1, batch // 8)
    return steps * per_token
