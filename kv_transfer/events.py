"""What a worker is told of its hand-offs. Every hand-off gets at most one of them; none follows abort() or
finish()."""

from __future__ import annotations

from dataclasses import dataclass

from ..proto.errors import DiphaseError
from ..proto.ids import HandoffKey
from ..proto.inference_pb2 import TokenLogprobs
from ..proto.worker_pb2 import Submit


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """The decode worker has verified everything: the request is its own now."""

    key: HandoffKey


@dataclass(frozen=True, slots=True, kw_only=True)
class SendFailed:
    """The hand-off is over for a reason that is not the owner's; not reported after abort() or finish()."""

    key: HandoffKey
    error: DiphaseError


SenderEvent = Sent | SendFailed


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """A verified hand-off. One reference to each of `block_ids` passes to the taker."""

    key: HandoffKey
    submit: Submit
    block_ids: list[int]
    """Of the whole prompt in order of position: cached ones first, then those that arrived."""
    num_tokens: int
    """Whose KV the blocks hold; the next position to compute is the first token's, or in the prompt if it was
    quicker not to send its KV."""
    cached_tokens: int
    """Of them, those that this worker had already."""
    token_id: int
    """The first token of this attempt; it has left for the client already."""
    logprobs: TokenLogprobs | None
    token_at: float
    """Clock of the prefill worker."""
    reserved_at: float
    """This worker's clock, as all below: when the reservation was asked for."""
    granted_at: float
    completed_at: float
    """When the prefill side had said that everything is on its way."""
    verified_at: float
    num_bytes: int
    num_segments: int
    """Runs of bytes in the destination pool."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReceiveFailed:
    """A hand-off ended before it was Ready; its blocks are the receiver's to clean up. Not reported after
    abort(), nor when the prefill side ended it without an error (the first token ended the request, a
    cancel)."""

    key: HandoffKey
    submit: Submit
    error: DiphaseError


ReceiverEvent = Ready | ReceiveFailed
