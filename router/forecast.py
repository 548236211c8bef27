"""What a placement would come to: TTFT, TPOT and what they leave of the objectives, from the workers' loads
and fitted step times. All policies predict with this; it chooses nothing.

TTFT depends on the worker that computes the prompt (queue and uncached prompt) and TPOT and memory on the one
that decodes (a step with one more sequence, the hand-off, memory for the expected output): each side is
predicted by itself, once for every worker, and two sides make a placement.

Predicting both latencies at placement and weighing cached prefixes against queues follows Mooncake's
Conductor (FAST 2025).
"""

from __future__ import annotations

from dataclasses import dataclass

from .placement import Demand, Placement
from .prefix_index import PrefixIndex
from .worker_handle import WorkerHandle

SMOOTHING = 0.02
"""Least weight of the newest completion length and hand-off time in their running means."""


@dataclass(slots=True)
class PromptSide:
    """What a prefill worker offers, whoever decodes."""

    worker: WorkerHandle
    uncached: int
    """Tokens of the prompt to compute there."""
    prompt_s: float
    """Until they are, with all that waits there before."""


@dataclass(slots=True)
class DecodeSide:
    """What a worker that decodes offers, whoever computes the prompt."""

    worker: WorkerHandle
    token_s: float
    """A token with this sequence in the batch, without a hand-off."""
    memory: float
    """Share of the KV pool that stays free."""
    batch_s: float
    """What decoding its present batch adds to each step."""


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


class Predictor:
    """Remembers only the running means of completion lengths and hand-off times."""

    def __init__(self, prefixes: PrefixIndex, expected_output_tokens: int) -> None:
        self._prefixes = prefixes
        self._output_tokens = _RunningMean(float(expected_output_tokens), weight=10)
        self._handoff_s = _RunningMean(0.0, weight=0)

    def observe_completion(self, num_tokens: int) -> None:
        self._output_tokens.observe(num_tokens)

    def observe_handoff(self, seconds: float) -> None:
        self._handoff_s.observe(seconds)

    def forecast(self, demand: Demand) -> Forecast:
        output = max(1.0, min(float(demand.max_new_tokens), self._output_tokens.value))
        return Forecast(demand, self._prefixes, output, self._handoff_s.value)


class Forecast:
    """For one demand: `output` is how many tokens it will probably generate, `handoff_s` how long its
    hand-off will take."""

    __slots__ = ("_demand", "_handoff_s", "_output", "_prefixes")

    def __init__(self, demand: Demand, prefixes: PrefixIndex, output: float, handoff_s: float) -> None:
        self._demand = demand
        self._prefixes = prefixes
        self._output = output
        self._handoff_s = handoff_s

    def of(self, prefill: WorkerHandle | None, decode: WorkerHandle) -> Placement:
        """The placement on these workers."""
        side = self.decode_side(decode)
        if prefill is None:
            return self.alone(side, self.uncached(decode))
        return self.pair(self.prompt_side(prefill), side)

    def uncached(self, worker: WorkerHandle) -> int:
        """Tokens to compute there; the last one always is, for its logits."""
        num_tokens = self._demand.num_tokens
        if not self._prefixes.num_blocks(worker.worker_id):
            return num_tokens
        cached = self._prefixes.cached_blocks(worker.worker_id, self._demand.block_hashes(worker))
        return num_tokens - min(cached * worker.block_size, num_tokens - 1)

    def prompt_side(self, worker: WorkerHandle) -> PromptSide:
        """A prefill worker's."""
        uncached = self.uncached(worker)
        return PromptSide(worker, uncached, self._prompt_s(worker, uncached, 0.0))

    def decode_side(self, worker: WorkerHandle) -> DecodeSide:
        """With one more sequence, which will grow by the expected output."""
        load = worker.load
        output, num_tokens = self._output, self._demand.num_tokens
        base, per_token, _, per_sequence, per_context = worker.terms
        incoming, incoming_tokens = worker.incoming
        batch, context = load.running + incoming, load.running_context + incoming_tokens
        batch_s = per_sequence * batch + per_context * context
        step_s = base + batch_s + per_sequence + per_context * (num_tokens + output / 2)
        # Without a place in the batch or enough blocks, it waits for a share of the others to end,
        # those included whose hand-off is on its way.
        waits = 0.0
        if batch >= worker.max_running > 0:
            waits = (batch + 1 - worker.max_running) / worker.max_running
        free = worker.usable_blocks - (num_tokens + output + worker.promised_tokens) / worker.block_size
        if free < 0.0:
            waits -= free / max(1, load.blocks_running + load.blocks_reserved)
        memory = free / load.blocks_total if load.blocks_total else 1.0
        own_prompts_s = per_token * load.waiting_tokens / output
        return DecodeSide(worker, step_s * (1.0 + waits) + own_prompts_s, memory, batch_s)

    def pair(self, prompt: PromptSide, decode: DecodeSide) -> Placement:
        """The prompt on one worker, a hand-off, its tokens on the other."""
        token_s = decode.token_s + self._handoff_s / self._output
        return self._placement(prompt.worker, decode, prompt.uncached, prompt.prompt_s, token_s)

    def alone(self, side: DecodeSide, uncached: int) -> Placement:
        """Both phases on one worker: chunks of the prompt ride on its decode steps and lengthen them."""
        worker = side.worker
        prompt_s = self._prompt_s(worker, uncached, side.batch_s)
        # What the chunks cost is spread over the tokens that everybody in the batch waits for meanwhile.
        token_s = side.token_s + worker.terms[1] * uncached / self._output
        return self._placement(None, side, uncached, prompt_s, token_s)

    def _prompt_s(self, worker: WorkerHandle, uncached: int, batch_s: float) -> float:
        """Seconds until the worker has computed what waits there and then the `uncached` last tokens of the
        prompt; `batch_s` is added to each step by the sequences that it decodes."""
        base, per_token, per_context, _, _ = worker.terms
        waiting, chunk = worker.waiting_tokens, worker.chunk_budget
        context = uncached * (self._demand.num_tokens - uncached / 2)
        if waiting:
            context += waiting * waiting / (2.0 * max(1, worker.waiting_requests))  # prompts of equal length
        todo = waiting + uncached
        steps = -(-todo // chunk) if chunk else 1
        steps_s = steps * (base + batch_s)
        return worker.clock.round_trip_s / 2 + steps_s + per_token * todo + per_context * context

    def _placement(
        self,
        prefill: WorkerHandle | None,
        side: DecodeSide,
        uncached: int,
        prompt_s: float,
        token_s: float,
    ) -> Placement:
        demand = self._demand
        ttft_ms, tpot_ms = (demand.elapsed_s + prompt_s) * 1000.0, token_s * 1000.0
        slacks = [1.0 - ttft_ms / demand.slo.ttft_ms, side.memory]
        if demand.max_new_tokens > 1:  # one token has no TPOT
            slacks.append(1.0 - tpot_ms / demand.slo.tpot_ms)
        slacks.sort()
        return Placement(
            prefill=prefill,
            decode=side.worker,
            uncached_tokens=uncached,
            ttft_ms=ttft_ms,
            tpot_ms=tpot_ms if demand.max_new_tokens > 1 else None,
            slacks=tuple(slacks),
            informed=side.worker.model.informed and (prefill is None or prefill.model.informed),
        )
