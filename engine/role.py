"""The seam between a worker's shell (host.py) and what makes it a prefill or a decode worker."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import grpc.aio
from prometheus_client.registry import Collector

from ..proto.errors import DiphaseError
from ..proto.ids import HandoffKey
from ..proto.inference_pb2 import TokenLogprobs
from ..proto.worker_pb2 import Inspect, Inspected, Load, SequenceOutput, Submit
from .base import LayerHook, StepPlan, StepResult

Servicer = Callable[[grpc.aio.Server], None]
"""Adds a gRPC service to a server that has not started."""


class Shell(Protocol):
    """What a role may ask of its host."""

    def wake(self) -> None:
        """plan() may have work now."""
        ...

    def adopt(
        self, submit: Submit, token_ids: Sequence[int] = (), logprobs: Sequence[TokenLogprobs] = ()
    ) -> bool:
        """A request came from a worker instead of a gateway, with tokens that the gateway has been sent
        already. An older attempt is cancelled. False when a newer one is here: the caller drops this one."""
        ...

    def emit(self, outputs: Sequence[SequenceOutput]) -> None:
        """Sends outputs that come from no step: failures."""
        ...

    def broken(self, error: Exception) -> None:
        """Something that the worker cannot work without is at its end, and so is the worker."""
        ...

    def retire(self, key: HandoffKey) -> None:
        """The attempt is another worker's now; whatever comes of it comes from there."""
        ...

    def handed_off(self, seconds: float, tail_s: float, num_bytes: int, num_segments: int) -> None:
        """A hand-off arrived: time from its grant, and from the prefill side's last word, to its
        verification."""
        ...


class Role(Protocol):
    """Scheduler and hand-off of one kind of worker. All methods are called on the event loop."""

    kind: str
    """prefill, decode or colocated."""

    def start(self, shell: Shell) -> None:
        """Binds to the running loop; called once, before anything else."""
        ...

    def submit(self, message: Submit, now: float) -> None:
        """Takes an attempt; the host has made sure that it is the newest.

        Raises:
            DiphaseError: it cannot be taken; the host reports the failure.
        """
        ...

    def cancel(self, request_id: str, attempt: int) -> None:
        """Ends this attempt and older ones without an output. Frees everything at once, or at the end of the
        running step if they are in it."""
        ...

    def plan(self, now: float) -> StepPlan | None:
        """The next step; None: nothing to do."""
        ...

    def layer_hook(self, plan: StepPlan) -> LayerHook | None:
        """What the engine calls after each layer of this plan."""
        ...

    def complete(self, plan: StepPlan, result: StepResult, now: float) -> list[SequenceOutput]:
        """What the step gave, ready to send."""
        ...

    def fail(self, plan: StepPlan, error: DiphaseError) -> list[SequenceOutput]:
        """The step raised: its requests end with `error`."""
        ...

    def load(self) -> Load: ...

    def prefix_events(self) -> tuple[list[bytes], list[bytes]]:
        """Block hashes (stored, evicted) since the last call."""
        ...

    def prefix_snapshot(self) -> list[bytes]:
        """All block hashes that a prompt could find."""
        ...

    def resume(self, request_id: str, gateway_id: str) -> None:
        """The request's tokens go to another gateway from now on."""
        ...

    def servicers(self) -> list[Servicer]:
        """Services that the worker's server offers beside its own."""
        ...

    def collectors(self) -> list[Collector]:
        """What Prometheus is told beside the host's own metrics."""
        ...

    def inspect(self, question: Inspect) -> Inspected:
        """What was transferred, by peer and transport, and what happened to the hand-offs of a request as
        far as it is remembered."""
        ...

    async def drain(self) -> None:
        """Takes no new hand-offs; returns when nothing is left, leases included. Cancelling it changes
        nothing."""
        ...

    def evict(self, error: DiphaseError) -> None:
        """Ends everything that is here: requests with `error`, and hand-offs in whatever state."""
        ...

    async def close(self) -> None:
        """Ends what is left: hand-offs, links, tasks."""
        ...
