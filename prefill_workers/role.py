"""The prefill role: computes prompts, sends token 0 to the gateway and the KV to the decode worker.

Joins the scheduler and the hand-off's sender; implements engine/role.py's Role. A request leaves when its KV
has been verified by the decode worker, or when it fails here, and then with one retryable terminal event.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from prometheus_client.registry import Collector

from ..engine.base import Chunk, LayerHook, ModelLimits, StepPlan, StepResult
from ..engine.block_manager import BlockManager
from ..engine.requests import Outcome, failed_output, logprobs_message, sequence_from_submit, token_output
from ..engine.role import Servicer, Shell
from ..engine.sequence import Sequence as TokenSequence
from ..kv_transfer.counters import HandoffCollector
from ..kv_transfer.sender import HandoffSender, SenderEvent, SendFailed
from ..proto.errors import Cancelled, DiphaseError, InvalidRequest, TransferError
from ..proto.ids import HandoffKey
from ..proto.worker_pb2 import Inspect, Inspected, Load, SequenceOutput, Submit
from .layer_pushes import LayeredChunk, LayerPushes
from .scheduler import PrefillScheduler


@dataclass(slots=True, kw_only=True)
class _Job:
    submit: Submit
    sequence: TokenSequence
    scheduled_at: float | None = None
    sends: bool = False
    """Its hand-off has begun."""


class PrefillRole:
    """`open_sender` makes the sender that reports to the given callback."""

    kind = "prefill"

    def __init__(
        self,
        *,
        scheduler: PrefillScheduler,
        blocks: BlockManager,
        limits: ModelLimits,
        num_layers: int,
        open_sender: Callable[[Callable[[SenderEvent], None]], HandoffSender],
    ) -> None:
        self._scheduler = scheduler
        self._blocks = blocks
        self._limits = limits
        self._num_layers = num_layers
        self._sender = open_sender(self._on_sender_event)
        self._shell: Shell
        self._jobs: dict[str, _Job] = {}  # by request_id: one attempt each
        self._pushes: LayerPushes | None = None
        self._idle = asyncio.Event()
        self._idle.set()

    def start(self, shell: Shell) -> None:
        self._shell = shell
        self._sender.start(shell.broken)

    def submit(self, message: Submit, now: float) -> None:
        if not message.decode.address:
            raise InvalidRequest("a prefill worker needs the decode worker that the request goes to")
        sequence = sequence_from_submit(message, self._limits, now)
        self._scheduler.add(sequence)
        self._jobs[message.request_id] = _Job(submit=message, sequence=sequence)
        self._idle.clear()

    def cancel(self, request_id: str, attempt: int) -> None:
        job = self._jobs.get(request_id)
        if job is not None and job.sequence.key.attempt <= attempt:
            self._sender.abort(job.sequence.key, Cancelled("the request was cancelled"))
            self._scheduler.cancel(job.sequence.key)
            self._forget(job)

    def plan(self, now: float) -> StepPlan | None:
        plan = self._scheduler.plan()
        if plan is None:
            return None
        for chunk in plan.chunks:
            job = self._jobs[chunk.sequence.key.request_id]
            if job.scheduled_at is None:
                job.scheduled_at = now
                self._begin_handoff(job, now)
        return plan

    def layer_hook(self, plan: StepPlan) -> LayerHook | None:
        chunks = [
            LayeredChunk(
                key=chunk.sequence.key,
                block_ids=list(chunk.sequence.block_table),
                num_tokens=chunk.sequence.num_computed + chunk.num_tokens,
                stops=self._push_stops(chunk),
            )
            for chunk in plan.chunks
        ]
        self._pushes = LayerPushes(chunks, self._num_layers, self._push)
        layered = any(len(chunk.stops) > 1 for chunk in chunks)
        return self._pushes.on_layer if layered else None

    def complete(self, plan: StepPlan, result: StepResult, now: float) -> list[SequenceOutput]:
        if self._pushes is not None:
            self._pushes.finish()
            self._pushes = None
        return [self._report(outcome, now) for outcome in self._scheduler.complete(plan, result)]

    def fail(self, plan: StepPlan, error: DiphaseError) -> list[SequenceOutput]:
        self._pushes = None
        outputs = []
        for sequence in self._scheduler.fail(plan):
            self._sender.abort(sequence.key, error)
            self._forget(self._jobs[sequence.key.request_id])
            outputs.append(failed_output(sequence.key, sequence.num_generated, error))
        return outputs

    def load(self) -> Load:
        counts = self._blocks.counts()
        running = min(self._scheduler.started_blocks, counts.used)
        return Load(
            waiting_requests=self._scheduler.num_waiting,
            waiting_tokens=self._scheduler.waiting_tokens,
            running=self._scheduler.num_started,
            running_context=self._scheduler.started_context,
            blocks_total=counts.total,
            blocks_free=counts.free,
            blocks_cached=counts.cached,
            blocks_running=running,
            blocks_held=counts.used - running,
            blocks_quarantined=counts.quarantined,
            handoffs=self._sender.in_flight,
        )

    def prefix_events(self) -> tuple[list[bytes], list[bytes]]:
        return self._blocks.events()

    def prefix_snapshot(self) -> list[bytes]:
        return self._blocks.known_hashes()

    def resume(self, request_id: str, gateway_id: str) -> None:
        if job := self._jobs.get(request_id):
            job.submit.gateway_id = gateway_id  # goes to the decode worker when the hand-off begins

    def servicers(self) -> list[Servicer]:
        return []

    def collectors(self) -> list[Collector]:
        return [HandoffCollector(self._sender.counters, self._sender.staging_bytes)]

    def inspect(self, question: Inspect) -> Inspected:
        return self._sender.inspect(question, outgoing=True)

    async def drain(self) -> None:
        await self._idle.wait()
        await self._sender.drain()

    def evict(self, error: DiphaseError) -> None:
        for job in list(self._jobs.values()):
            self._sender.abort(job.sequence.key, error)
            self._fail(job, error)

    async def close(self) -> None:
        await self._sender.close()

    def _begin_handoff(self, job: _Job, now: float) -> None:
        """Asks for the reservation, unless the first token ends the request in any case."""
        sequence = job.sequence
        next_length = sequence.num_tokens + 1
        if (
            sequence.num_generated + 1 >= sequence.params.max_tokens
            or next_length >= self._limits.context_length
        ):
            return
        submit = Submit()
        submit.CopyFrom(job.submit)
        submit.elapsed_s += now - sequence.arrived_at
        try:
            self._sender.begin(
                sequence.key,
                submit.decode,
                submit,
                sequence.num_tokens,
                sequence.block_hashes,
                cached_tokens=sequence.num_cached,
            )
        except ValueError:
            # An earlier life of this very attempt still holds blocks for its fence.
            self._fail_later(
                job, TransferError("an earlier hand-off of this attempt has not ended yet; retry")
            )
            return
        job.sends = True
        if sequence.num_computed:
            self._push(sequence.key, sequence.block_table, sequence.num_computed, 0, self._num_layers)

    def _push_stops(self, chunk: Chunk) -> tuple[int, ...]:
        key = chunk.sequence.key
        job = self._jobs.get(key.request_id)
        if job is None or not job.sends:
            return (self._num_layers,)
        return self._sender.push_stops(key, last=chunk.samples)

    def _push(
        self, key: HandoffKey, block_ids: Sequence[int], num_tokens: int, first_layer: int, num_layers: int
    ) -> None:
        self._sender.computed(key, block_ids, num_tokens, first_layer, num_layers)

    def _report(self, outcome: Outcome, now: float) -> SequenceOutput:
        """Token 0: to the gateway, and to the decode worker unless it is the last."""
        sequence, token = outcome.sequence, outcome.token
        job = self._jobs[sequence.key.request_id]
        output = token_output(outcome)
        output.prefill.received_at = sequence.arrived_at
        output.prefill.scheduled_at = job.scheduled_at or now
        output.prefill.token_at = now
        output.prefill.cached_tokens = sequence.num_cached
        if outcome.finish_reason:
            self._sender.finish(sequence.key)
            self._forget(job)
        else:
            logprobs = None if sequence.params.logprobs is None else logprobs_message(token)
            self._sender.seeded(sequence.key, token.token_id, now, logprobs)
        self._scheduler.release(sequence)
        return output

    def _on_sender_event(self, event: SenderEvent) -> None:
        job = self._jobs.get(event.key.request_id)
        if job is not None and job.sequence.key == event.key:
            if isinstance(event, SendFailed):
                self._fail(job, event.error)
            else:
                self._forget(job)
                self._shell.retire(event.key)
        self._shell.wake()  # its blocks are back

    def _fail_later(self, job: _Job, error: DiphaseError) -> None:
        """For failures inside plan(): the sequence is in the step that is about to run."""
        asyncio.get_running_loop().call_soon(self._fail_if_here, job, error)

    def _fail_if_here(self, job: _Job, error: DiphaseError) -> None:
        if self._jobs.get(job.sequence.key.request_id) is job:
            self._fail(job, error)

    def _fail(self, job: _Job, error: DiphaseError) -> None:
        sequence = job.sequence
        self._scheduler.cancel(sequence.key)
        self._forget(job)
        self._shell.emit([failed_output(sequence.key, sequence.num_generated, error)])

    def _forget(self, job: _Job) -> None:
        del self._jobs[job.sequence.key.request_id]
        if not self._jobs:
            self._idle.set()
