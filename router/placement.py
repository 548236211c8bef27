"""Where a request goes: a (prefill, decode) pair, or one worker that does both. Pure policy over plain data.

For every candidate it predicts TTFT (queue and uncached prompt on the worker that computes it) and TPOT (a
step with one more sequence, the hand-off, memory for the expected output) from the workers' loads and fitted
step times. What is left of the objectives is a candidate's *slack*: the shares of the TTFT objective, of the
TPOT objective and of the KV pool that remain free after the placement. Goodput is lost where the tightest of
them runs out first, so the candidate with the largest smallest slack is taken (ties: the next smallest, then
the fixed order of workers). TTFT depends on the prefill worker alone and TPOT and memory on the decode worker
alone, so the best pair is the best of each, and a placement costs one look at every worker instead of one at
every pair.

Predicting both latencies at placement and weighing cached prefixes against queues follows Mooncake's
Conductor (FAST 2025); judging by both objectives at once follows DistServe's goodput (OSDI 2024).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from ..proto.slo import Slo
from .latency_model import NOTHING, StepShape, prompt_shape
from .prefix_index import PrefixIndex
from .worker_handle import WorkerHandle

SMOOTHING = 0.02
"""Weight of the newest completion length and hand-off time in their running means."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What is to be placed: one attempt at one request."""

    num_tokens: int
    """To be computed or found cached: prompt and tokens of earlier attempts."""
    max_new_tokens: int
    """The most that it may still generate."""
    slo: Slo
    elapsed_s: float
    """Since the gateway received it."""
    block_hashes: Callable[[WorkerHandle], Sequence[bytes]]
    """Of its full blocks, by the layout of that worker."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """A decision and the prediction behind it."""

    prefill: WorkerHandle | None
    """None: the decode worker computes the prompt itself."""
    decode: WorkerHandle
    uncached_tokens: int
    ttft_ms: float
    tpot_ms: float | None
    """None for a request of one token."""
    slacks: tuple[float, ...]
    """Ascending; the first is what decides. Negative: an objective will be missed, or memory is short."""
    informed: bool
    """Whether the step times of both workers were fitted to steps, not taken from a prior."""

    @property
    def first(self) -> WorkerHandle:
        """The worker that gets the submit."""
        return self.decode if self.prefill is None else self.prefill

    def meets(self, slo: Slo) -> bool:
        return self.ttft_ms <= slo.ttft_ms and (self.tpot_ms is None or self.tpot_ms <= slo.tpot_ms)


@dataclass(slots=True)
class _PrefillSide:
    worker: WorkerHandle
    uncached: int
    ttft_s: float


@dataclass(slots=True)
class _DecodeSide:
    worker: WorkerHandle
    step_s: float
    """A token with this sequence in the batch, without the hand-off."""
    memory: float
    """Share of the KV pool that stays free."""


class PlacementPolicy:
    """Chooses; remembers only the running means of completion lengths and hand-off times."""

    def __init__(self, prefixes: PrefixIndex, local_prefill_tokens: int, expected_output_tokens: int) -> None:
        self._prefixes = prefixes
        self._local_prefill_tokens = local_prefill_tokens
        self._output_tokens = float(expected_output_tokens)
        self._handoff_s = 0.0

    def observe_completion(self, num_tokens: int) -> None:
        """A request finished with so many tokens."""
        self._output_tokens += SMOOTHING * (num_tokens - self._output_tokens)

    def observe_handoff(self, seconds: float) -> None:
        """A hand-off took so long, from token 0 to verified."""
        self._handoff_s += SMOOTHING * (seconds - self._handoff_s)

    def place(
        self, demand: Demand, workers: Sequence[WorkerHandle], avoid: Collection[str] = ()
    ) -> Placement | None:
        """The best placement on the ready `workers`; those named in `avoid` only where their role has no
        other. None: nothing is possible now."""
        output = max(1.0, min(float(demand.max_new_tokens), self._output_tokens))
        prefills = _prefer([worker for worker in workers if worker.role == "prefill"], avoid)
        decodes = _prefer([worker for worker in workers if worker.role != "prefill"], avoid)
        best: Placement | None = None
        for worker in decodes:
            if self._may_compute(worker, demand, prefills):
                best = _better(best, self._local(worker, demand, output))
        if prefills:
            for layout in {worker.layout_hash: None for worker in decodes}:
                best = _better(best, self._pair(layout, prefills, decodes, demand, output))
        return best

    def _may_compute(self, worker: WorkerHandle, demand: Demand, prefills: Sequence[WorkerHandle]) -> bool:
        """Whether a worker may take the whole request: it is colocated, the prefill pool is dead, or what it
        has to compute is short."""
        if worker.role == "colocated" or not prefills:
            return True
        return self._uncached(worker, demand) <= self._local_prefill_tokens

    def _uncached(self, worker: WorkerHandle, demand: Demand) -> int:
        """Tokens to compute there; the last one always is, for its logits."""
        if not self._prefixes.num_blocks(worker.worker_id):
            return demand.num_tokens
        cached = self._prefixes.cached_blocks(worker.worker_id, demand.block_hashes(worker))
        return demand.num_tokens - min(cached * worker.block_size, demand.num_tokens - 1)

    def _pair(
        self,
        layout: str,
        prefills: Sequence[WorkerHandle],
        decodes: Sequence[WorkerHandle],
        demand: Demand,
        output: float,
    ) -> Placement | None:
        sides = [self._prefill_side(worker, demand) for worker in prefills if worker.layout_hash == layout]
        if not sides:
            return None
        prefill = min(sides, key=lambda side: side.ttft_s)
        tpot_slo_s = demand.slo.tpot_ms / 1000.0
        decode = max(
            (self._decode_side(worker, demand, output) for worker in decodes if worker.layout_hash == layout),
            key=lambda side: min(1.0 - side.step_s / tpot_slo_s, side.memory),
        )
        tpot_s = decode.step_s + self._handoff_s / output
        return self._placement(prefill, decode, tpot_s, demand, pair=True)

    def _local(self, worker: WorkerHandle, demand: Demand, output: float) -> Placement:
        """One worker does both: chunks of the prompt ride on its decode steps and lengthen them."""
        decode = self._decode_side(worker, demand, output)
        uncached = self._uncached(worker, demand)
        batch, context = _batch(worker)
        beside = StepShape(decode_batch=batch, decode_context=context)
        chunk = max(_chunk(worker), self._local_prefill_tokens)
        ttft_s = demand.elapsed_s + _queue_and_prompt_s(worker, demand, uncached, chunk, beside)
        # What the chunks cost is spread over the tokens that everybody in the batch waits for meanwhile.
        model = worker.model
        chunks_s = model.prompt_s(uncached, prompt_shape(uncached).prefill_context, 0.0)
        prefill = _PrefillSide(worker, uncached, ttft_s)
        return self._placement(prefill, decode, decode.step_s + chunks_s / output, demand, pair=False)

    def _prefill_side(self, worker: WorkerHandle, demand: Demand) -> _PrefillSide:
        uncached = self._uncached(worker, demand)
        ttft_s = demand.elapsed_s + _queue_and_prompt_s(worker, demand, uncached, _chunk(worker), NOTHING)
        return _PrefillSide(worker, uncached, ttft_s)

    def _decode_side(self, worker: WorkerHandle, demand: Demand, output: float) -> _DecodeSide:
        load, model = worker.load, worker.model
        batch, context = _batch(worker)
        step_s = model.step_s(
            StepShape(decode_batch=batch + 1, decode_context=context + demand.num_tokens + output / 2)
        )
        extra = model.prompt_s(load.waiting_tokens, 0.0, 0.0) / output  # prompts that it computes itself
        # Without a free place in the batch or enough blocks the sequence waits for a share of the others to
        # end.
        max_running = worker.hello.max_running if worker.hello is not None else 0
        excess = max(0, batch + 1 - max_running) / max_running if max_running else 0.0
        block_size = worker.block_size
        incoming_tokens = context - load.running_context
        needed = (demand.num_tokens + output + incoming_tokens) / block_size
        free = worker.usable_blocks - needed
        shortage = max(0.0, -free) / max(1, load.blocks_running)
        memory = free / load.blocks_total if load.blocks_total else 1.0
        return _DecodeSide(worker, step_s * (1.0 + excess + shortage) + extra, memory)

    def _placement(
        self, prefill: _PrefillSide, decode: _DecodeSide, tpot_s: float, demand: Demand, *, pair: bool
    ) -> Placement:
        ttft_ms = prefill.ttft_s * 1000.0
        tpot_ms = tpot_s * 1000.0 if demand.max_new_tokens > 1 else None
        slacks = [1.0 - ttft_ms / demand.slo.ttft_ms, decode.memory]
        if tpot_ms is not None:
            slacks.append(1.0 - tpot_ms / demand.slo.tpot_ms)
        return Placement(
            prefill=prefill.worker if pair else None,
            decode=decode.worker,
            uncached_tokens=prefill.uncached,
            ttft_ms=ttft_ms,
            tpot_ms=tpot_ms,
            slacks=tuple(sorted(slacks)),
            informed=prefill.worker.model.informed and decode.worker.model.informed,
        )


def _prefer(workers: list[WorkerHandle], avoid: Collection[str]) -> list[WorkerHandle]:
    """Those that are not to be avoided, or all where that leaves none."""
    return [worker for worker in workers if worker.worker_id not in avoid] or workers


def _better(best: Placement | None, other: Placement | None) -> Placement | None:
    """The one with more slack; the earlier one where they are equal."""
    if best is None or (other is not None and other.slacks > best.slacks):
        return other
    return best


def _chunk(worker: WorkerHandle) -> int:
    """Prompt tokens a step."""
    return worker.hello.chunk_budget if worker.hello is not None else 0


def _batch(worker: WorkerHandle) -> tuple[int, float]:
    """Sequences that decode there soon, and their context tokens."""
    incoming, incoming_tokens = worker.incoming
    return worker.load.running + incoming, float(worker.load.running_context + incoming_tokens)


def _queue_and_prompt_s(
    worker: WorkerHandle, demand: Demand, uncached: int, chunk: int, beside: StepShape
) -> float:
    """Seconds until the worker has computed what waits there and then this prompt; each step also decodes
    what `beside` says."""
    waiting = worker.waiting_tokens
    queued_context = waiting * waiting / (2.0 * max(1, worker.waiting_requests))  # prompts of equal length
    own_context = prompt_shape(uncached, demand.num_tokens - uncached).prefill_context
    steps = math.ceil((waiting + uncached) / chunk) if chunk else 1
    return worker.clock.round_trip_s / 2 + worker.model.prompt_s(
        waiting + uncached, queued_context + own_context, steps, beside
    )
