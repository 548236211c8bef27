"""The decode role: admits verified hand-offs, generates tokens, and computes the prompts that are placed
here.

Joins the scheduler and the hand-off's receiver; implements engine/role.py's Role. A colocated worker is this
role without a receiver and with a larger chunk budget.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from prometheus_client.registry import Collector

from ..engine.base import LayerHook, ModelLimits, StepPlan, StepResult
from ..engine.block_manager import BlockManager
from ..engine.requests import Outcome, failed_output, sequence_from_submit, token_output
from ..engine.role import Servicer, Shell
from ..engine.sequence import Sequence as TokenSequence
from ..kv_transfer.counters import HandoffCollector
from ..kv_transfer.receiver import HandoffReceiver, Ready, ReceiveFailed, ReceiverEvent
from ..proto.errors import Cancelled, DiphaseError, InvalidRequest, PromptTooLong
from ..proto.ids import HandoffKey
from ..proto.worker_pb2 import Inspect, Inspected, Load, SequenceOutput, Submit
from .load import write_load
from .reservations import ReservationPool
from .scheduler import DecodeScheduler

OLD_ATTEMPTS = 8
"""Attempts before a cancelled one whose hand-offs are looked for: more than a gateway ever makes."""

OpenReceiver = Callable[[ReservationPool, Callable[[ReceiverEvent], None]], HandoffReceiver]
"""Makes the receiver that takes blocks from the pool and reports to the callback."""


@dataclass(slots=True, kw_only=True)
class _Job:
    sequence: TokenSequence
    handoff: Ready | None
    """None: the prompt is computed here."""
    scheduled_at: float | None = None
    reported: bool = False
    """Its first output here has left."""


class DecodeRole:
    """`open_receiver` is None for a colocated worker; `servicers` offer the receiver to prefill workers."""

    def __init__(
        self,
        *,
        kind: str,
        scheduler: DecodeScheduler,
        blocks: BlockManager,
        limits: ModelLimits,
        open_receiver: OpenReceiver | None = None,
        servicers: Callable[[HandoffReceiver], Sequence[Servicer]] = lambda _: (),
    ) -> None:
        self.kind = kind
        self._scheduler = scheduler
        self._blocks = blocks
        self._limits = limits
        self._receiver: HandoffReceiver | None = None
        self._servicers: list[Servicer] = []
        if open_receiver is not None:
            pool = ReservationPool(blocks, lambda: scheduler.growth_blocks)
            self._receiver = open_receiver(pool, self._on_receiver_event)
            self._servicers += servicers(self._receiver)
        self._shell: Shell
        self._jobs: dict[str, _Job] = {}  # by request_id: one attempt each
        self._idle = asyncio.Event()
        self._idle.set()

    def start(self, shell: Shell) -> None:
        self._shell = shell
        if self._receiver is not None:
            self._receiver.start(shell.broken)

    def submit(self, message: Submit, now: float) -> None:
        sequence = sequence_from_submit(message, self._limits, now)
        self._scheduler.add(sequence)
        self._take(_Job(sequence=sequence, handoff=None))

    def cancel(self, request_id: str, attempt: int) -> None:
        if self._receiver is not None:
            for earlier in range(max(0, attempt - OLD_ATTEMPTS), attempt + 1):
                self._receiver.abort(HandoffKey(request_id, earlier), Cancelled("the request was cancelled"))
        job = self._jobs.get(request_id)
        if job is not None and job.sequence.key.attempt <= attempt:
            self._scheduler.cancel(job.sequence.key)
            self._forget(job)
        self._room_freed()

    def plan(self, now: float) -> StepPlan | None:
        plan = self._scheduler.plan()
        self._fail_outgrown()
        if plan is None:
            self._room_freed()
            return None
        for chunk in plan.chunks:
            job = self._jobs[chunk.sequence.key.request_id]
            if job.scheduled_at is None:
                job.scheduled_at = now
        return plan

    def layer_hook(self, plan: StepPlan) -> LayerHook | None:
        return None

    def complete(self, plan: StepPlan, result: StepResult, now: float) -> list[SequenceOutput]:
        outputs = [self._report(outcome, now) for outcome in self._scheduler.complete(plan, result)]
        self._room_freed()
        return outputs

    def fail(self, plan: StepPlan, error: DiphaseError) -> list[SequenceOutput]:
        outputs = []
        for sequence in self._scheduler.fail(plan):
            self._forget(self._jobs[sequence.key.request_id])
            outputs.append(failed_output(sequence.key, sequence.num_generated, error))
        return outputs

    def load(self) -> Load:
        receiver, load = self._receiver, Load()
        write_load(
            load,
            self._scheduler,
            self._blocks.counts(),
            reserved=receiver.reserved_blocks if receiver is not None else 0,
            handoffs=receiver.in_flight if receiver is not None else 0,
        )
        return load

    def prefix_events(self) -> tuple[list[bytes], list[bytes]]:
        return self._blocks.events()

    def prefix_snapshot(self) -> list[bytes]:
        return self._blocks.known_hashes()

    def resume(self, request_id: str, gateway_id: str) -> None:
        """Nothing here names the gateway: the host routes what is emitted."""

    def servicers(self) -> list[Servicer]:
        return self._servicers

    def collectors(self) -> list[Collector]:
        receiver = self._receiver
        return [] if receiver is None else [HandoffCollector(receiver.counters, receiver.staging_bytes)]

    def inspect(self, question: Inspect) -> Inspected:
        if self._receiver is None:
            return Inspected(id=question.id)
        return self._receiver.inspect(question, outgoing=False)

    async def drain(self) -> None:
        if self._receiver is not None:
            await self._receiver.drain()
        await self._idle.wait()

    def evict(self, error: DiphaseError) -> None:
        if self._receiver is not None:
            self._receiver.abort_all(error)
        for job in list(self._jobs.values()):
            self._scheduler.cancel(job.sequence.key)
            self._forget(job)
            self._shell.emit([failed_output(job.sequence.key, job.sequence.num_generated, error)])

    async def close(self) -> None:
        if self._receiver is not None:
            await self._receiver.close()

    def _report(self, outcome: Outcome, now: float) -> SequenceOutput:
        sequence = outcome.sequence
        job = self._jobs[sequence.key.request_id]
        output = token_output(outcome)
        if not job.reported:
            job.reported = True
            self._add_times(output, job, now)
        if outcome.finish_reason:
            self._forget(job)
        return output

    def _add_times(self, output: SequenceOutput, job: _Job, now: float) -> None:
        """Stamps of the first token here: after a hand-off, or of a prompt that was computed here."""
        scheduled_at = job.scheduled_at or now
        if job.handoff is not None:
            output.decode.verified_at = job.handoff.verified_at
            output.decode.scheduled_at = scheduled_at
            output.decode.token_at = now
            output.decode.handoff_bytes = job.handoff.num_bytes
            output.decode.handoff_segments = job.handoff.num_segments
        else:
            output.prefill.received_at = job.sequence.arrived_at
            output.prefill.scheduled_at = scheduled_at
            output.prefill.token_at = now
            output.prefill.cached_tokens = job.sequence.num_cached

    def _on_receiver_event(self, event: ReceiverEvent) -> None:
        if isinstance(event, Ready):
            self._admit(event)
        elif isinstance(event, ReceiveFailed) and self._shell.adopt(event.submit):
            self._shell.emit([failed_output(event.key, len(event.submit.emitted_token_ids), event.error)])
        self._shell.wake()

    def _admit(self, handoff: Ready) -> None:
        """Takes the blocks of a verified hand-off: the sequence runs from its second token on."""
        logprobs = () if handoff.logprobs is None else (handoff.logprobs,)
        try:
            sequence = sequence_from_submit(handoff.submit, self._limits, handoff.verified_at)
            if handoff.token_id >= self._limits.vocab_size:  # it would fail the step of every other, too
                raise InvalidRequest(
                    f"token id {handoff.token_id} came with the hand-off and is not in the vocabulary; "
                    f"ids are below {self._limits.vocab_size}"
                )
        except DiphaseError as error:
            self._blocks.release(handoff.block_ids)
            if self._shell.adopt(handoff.submit, (handoff.token_id,), logprobs):
                index = len(handoff.submit.emitted_token_ids) + 1
                self._shell.emit([failed_output(handoff.key, index, error)])
            return
        if not self._shell.adopt(handoff.submit, (handoff.token_id,), logprobs):
            self._blocks.release(handoff.block_ids)
            return
        # elapsed_s ends where the prefill side asked for the reservation: what it computed since counts, too.
        sequence.waited_s += handoff.verified_at - handoff.reserved_at
        sequence.token_ids.append(handoff.token_id)
        if handoff.num_tokens == sequence.num_tokens - 1:
            sequence.block_table = handoff.block_ids
            sequence.num_computed = handoff.num_tokens
            sequence.num_cached = handoff.cached_tokens
            self._scheduler.admit(sequence)
        elif not self._compute_here(sequence, handoff):
            return
        self._take(_Job(sequence=sequence, handoff=handoff))
        self._shell.handed_off(
            handoff.verified_at - handoff.granted_at,
            handoff.verified_at - handoff.completed_at,
            handoff.num_bytes,
            handoff.num_segments,
        )

    def _compute_here(self, sequence: TokenSequence, handoff: Ready) -> bool:
        """The link would have been slower than computing the prompt; False: there is no place for it."""
        self._blocks.release(handoff.block_ids)
        try:
            self._scheduler.add(sequence)
        except DiphaseError as error:
            self._shell.emit([failed_output(handoff.key, sequence.num_generated, error)])
            return False
        return True

    def _fail_outgrown(self) -> None:
        for sequence in self._scheduler.take_outgrown():
            self._forget(self._jobs[sequence.key.request_id])
            error = PromptTooLong(
                f"{sequence.num_tokens} tokens of prompt and completion need more than the pool's "
                f"{self._blocks.num_blocks} KV blocks; ask for fewer or raise engine.kv_cache_mib"
            )
            self._shell.emit([failed_output(sequence.key, sequence.num_generated, error)])

    def _room_freed(self) -> None:
        if self._receiver is not None:
            self._receiver.room_freed()

    def _take(self, job: _Job) -> None:
        self._jobs[job.sequence.key.request_id] = job
        self._idle.clear()

    def _forget(self, job: _Job) -> None:
        del self._jobs[job.sequence.key.request_id]
        if not self._jobs:
            self._idle.set()
