"""Where a request goes: a (prefill, decode) pair, or one worker that does both. Pure policy over plain data.

For every candidate it predicts TTFT (queue and uncached prompt on the worker that computes it) and TPOT (a
step with one more sequence, the hand-off, memory for the expected output) from the workers' loads and fitted
step times. What is left of the objectives is a candidate's *slack*: the shares of the TTFT objective, of the
TPOT objective and of the KV pool that remain free after the placement. Goodput is lost where the tightest of
them runs out first, so the candidate with the largest smallest slack is taken (within a hundredth: the one
with the next smallest; then the fixed order of workers). TTFT depends on the prefill worker alone and TPOT
and memory on the decode worker alone, so the best pair is the best of each, and a placement costs one look at
every worker instead of one at every pair.

Predicting both latencies at placement and weighing cached prefixes against queues follows Mooncake's
Conductor (FAST 2025); judging by both objectives at once follows DistServe's goodput (OSDI 2024).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from ..proto.slo import Slo
from .prefix_index import PrefixIndex
from .worker_handle import WorkerHandle

SMOOTHING = 0.02
"""Least weight of the newest completion length and hand-off time in their running means."""


@dataclass(slots=True)
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


@dataclass(slots=True, kw_only=True)
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
class _DecodeSide:
    """What a decode worker offers, whoever computes the prompt."""

    worker: WorkerHandle
    token_s: float
    """A token with this sequence in the batch, without a hand-off."""
    memory: float
    """Share of the KV pool that stays free."""
    batch_s: float
    """What decoding its present batch adds to each step."""


@dataclass(slots=True)
class _Candidate:
    slacks: tuple[float, ...]
    prefill: WorkerHandle | None
    decode: WorkerHandle
    uncached: int
    ttft_s: float
    token_s: float


class _RunningMean:
    """The mean of everything while that is little, then an exponential one. `value` counts as `weight`
    observations at the start."""

    __slots__ = ("_count", "value")

    def __init__(self, value: float, weight: int) -> None:
        self.value = value
        self._count = weight

    def observe(self, value: float) -> None:
        self._count += 1
        self.value += max(SMOOTHING, 1.0 / self._count) * (value - self.value)


class PlacementPolicy:
    """Chooses; remembers only the running means of completion lengths and hand-off times."""

    def __init__(self, prefixes: PrefixIndex, local_prefill_tokens: int, expected_output_tokens: int) -> None:
        self._prefixes = prefixes
        self._local_prefill_tokens = local_prefill_tokens
        self._output_tokens = _RunningMean(float(expected_output_tokens), weight=10)
        self._handoff_s = _RunningMean(0.0, weight=0)

    def observe_completion(self, num_tokens: int) -> None:
        """A request finished with so many tokens."""
        self._output_tokens.observe(num_tokens)

    def observe_handoff(self, seconds: float) -> None:
        """A hand-off took so long, from token 0 to verified."""
        self._handoff_s.observe(seconds)

    def place(
        self, demand: Demand, workers: Sequence[WorkerHandle], avoid: Collection[str] = ()
    ) -> Placement | None:
        """The best placement on the ready `workers`; those named in `avoid` only where their role has no
        other. None: nothing is possible now."""
        output = max(1.0, min(float(demand.max_new_tokens), self._output_tokens.value))
        prefills: list[WorkerHandle] = []
        decodes: list[WorkerHandle] = []
        for worker in workers:
            (prefills if worker.role == "prefill" else decodes).append(worker)
        if avoid:
            prefills, decodes = _prefer(prefills, avoid), _prefer(decodes, avoid)
        layouts = dict.fromkeys(worker.layout_hash for worker in prefills)
        sides = [_decode_side(worker, demand.num_tokens, output) for worker in decodes]
        candidates = []
        for side in sides:
            uncached = self._uncached(side.worker, demand)
            # Both phases on one worker: it is colocated, no prefill worker can hand over to it, or little is
            # to compute.
            alone = side.worker.role == "colocated" or side.worker.layout_hash not in layouts
            if alone or uncached <= self._local_prefill_tokens:
                candidates.append(self._local(side, uncached, demand, output))
        for layout in layouts:
            then = [
                side for side in sides if side.worker.role == "decode" and side.worker.layout_hash == layout
            ]
            if then:
                first = [worker for worker in prefills if worker.layout_hash == layout]
                candidates.append(self._pair(first, then, demand, output))
        if not candidates:
            return None
        best = candidates[0] if len(candidates) == 1 else max(candidates, key=_preference)  # first of equals
        return Placement(
            prefill=best.prefill,
            decode=best.decode,
            uncached_tokens=best.uncached,
            ttft_ms=best.ttft_s * 1000.0,
            tpot_ms=best.token_s * 1000.0 if demand.max_new_tokens > 1 else None,
            slacks=best.slacks,
            informed=best.decode.model.informed and (best.prefill is None or best.prefill.model.informed),
        )

    def _uncached(self, worker: WorkerHandle, demand: Demand) -> int:
        """Tokens to compute there; the last one always is, for its logits."""
        if not self._prefixes.num_blocks(worker.worker_id):
            return demand.num_tokens
        cached = self._prefixes.cached_blocks(worker.worker_id, demand.block_hashes(worker))
        return demand.num_tokens - min(cached * worker.block_size, demand.num_tokens - 1)

    def _pair(
        self, prefills: Sequence[WorkerHandle], sides: Sequence[_DecodeSide], demand: Demand, output: float
    ) -> _Candidate:
        """The best of each, among workers of one layout."""
        ttft_s, uncached, prefill = float("inf"), 0, prefills[0]
        for worker in prefills:
            worker_uncached = self._uncached(worker, demand)
            worker_s = _prompt_s(worker, demand.num_tokens, worker_uncached, worker.chunk_budget, 0.0)
            if worker_s < ttft_s:
                ttft_s, uncached, prefill = worker_s, worker_uncached, worker
        decode = sides[0]
        if len(sides) > 1:
            per_objective = 1000.0 / demand.slo.tpot_ms
            decode = max(sides, key=lambda side: min(1.0 - side.token_s * per_objective, side.memory))
        token_s = decode.token_s + self._handoff_s.value / output
        ttft_s += demand.elapsed_s
        slacks = _slacks_of(demand, ttft_s, token_s, decode.memory)
        return _Candidate(slacks, prefill, decode.worker, uncached, ttft_s, token_s)

    def _local(self, side: _DecodeSide, uncached: int, demand: Demand, output: float) -> _Candidate:
        """Chunks of the prompt ride on the worker's decode steps and lengthen them."""
        worker = side.worker
        prompt_s = _prompt_s(worker, demand.num_tokens, uncached, worker.chunk_budget, side.batch_s)
        ttft_s = demand.elapsed_s + prompt_s
        # What the chunks cost is spread over the tokens that everybody in the batch waits for meanwhile.
        token_s = side.token_s + worker.terms[1] * uncached / output
        slacks = _slacks_of(demand, ttft_s, token_s, side.memory)
        return _Candidate(slacks, None, worker, uncached, ttft_s, token_s)


def _decode_side(worker: WorkerHandle, num_tokens: int, output: float) -> _DecodeSide:
    """The prediction for one more sequence of `num_tokens` that will grow by `output`."""
    load = worker.load
    base, per_token, _, per_sequence, per_context = worker.terms
    incoming, incoming_tokens = worker.incoming
    batch, context = load.running + incoming, load.running_context + incoming_tokens
    batch_s = per_sequence * batch + per_context * context
    step_s = base + batch_s + per_sequence + per_context * (num_tokens + output / 2)
    # Without a place in the batch or enough blocks, it waits for a share of the others to end.
    waits = 0.0
    if batch >= worker.max_running > 0:
        waits = (batch + 1 - worker.max_running) / worker.max_running
    free = worker.usable_blocks - (num_tokens + output + incoming_tokens) / worker.block_size
    if free < 0.0:
        waits -= free / max(1, load.blocks_running)
    memory = free / load.blocks_total if load.blocks_total else 1.0
    own_prompts_s = per_token * load.waiting_tokens / output
    return _DecodeSide(worker, step_s * (1.0 + waits) + own_prompts_s, memory, batch_s)


def _prompt_s(worker: WorkerHandle, num_tokens: int, uncached: int, chunk: int, batch_s: float) -> float:
    """Seconds until the worker has computed what waits there and then the `uncached` last tokens of a prompt;
    `batch_s` is added to each step by the sequences that it decodes."""
    base, per_token, per_context, _, _ = worker.terms
    waiting = worker.waiting_tokens
    context = uncached * (num_tokens - uncached / 2)
    if waiting:
        context += waiting * waiting / (2.0 * max(1, worker.waiting_requests))  # prompts of equal length
    todo = waiting + uncached
    steps = -(-todo // chunk) if chunk else 1
    return worker.clock.round_trip_s / 2 + steps * (base + batch_s) + per_token * todo + per_context * context


def _slacks_of(demand: Demand, ttft_s: float, token_s: float, memory: float) -> tuple[float, ...]:
    """Shares of the objectives and of memory that are left, ascending. One token has no TPOT."""
    slacks = [1.0 - ttft_s * 1000.0 / demand.slo.ttft_ms, memory]
    if demand.max_new_tokens > 1:
        slacks.append(1.0 - token_s * 1000.0 / demand.slo.tpot_ms)
    slacks.sort()
    return tuple(slacks)


def _preference(candidate: _Candidate) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Predictions are not good to less than a hundredth: within it, the next smallest slack decides."""
    return tuple([int(slack * 100.0) for slack in candidate.slacks]), candidate.slacks


def _prefer(workers: list[WorkerHandle], avoid: Collection[str]) -> list[WorkerHandle]:
    """Those that are not to be avoided, or all where that leaves none."""
    return [worker for worker in workers if worker.worker_id not in avoid] or workers
