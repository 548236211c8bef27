"""The decode side of hand-offs: grants room, verifies what arrives, passes it on. Runs on the event loop only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..proto.clock import Clock
from ..proto.errors import DiphaseError
from ..proto.ids import HandoffKey
from ..proto.inference_pb2 import TokenLogprobs
from ..proto.kv_layout import KvLayout
from ..proto.worker_pb2 import Submit
from .config import KvTransferConfig
from .link import LinkIdentity
from .pool import BlockPool
from .registry import TransportSet


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """A verified hand-off. One reference to each of `block_ids` passes to the taker."""

    key: HandoffKey
    submit: Submit
    block_ids: list[int]
    """Of the whole prompt in order of position: cached ones first, then those that arrived."""
    num_tokens: int
    """Whose KV the blocks hold; the next position to compute is the first token's."""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class ReceiveFailed:
    """A hand-off ended before it was Ready; its blocks are the receiver's to clean up. Not reported after abort(), nor
    when the prefill side ended it without an error (the first token ended the request, the client cancelled)."""

    key: HandoffKey
    submit: Submit
    error: DiphaseError


ReceiverEvent = Ready | ReceiveFailed


class HandoffReceiver:
    """All hand-offs that come to this process."""

    def __init__(
        self,
        *,
        config: KvTransferConfig,
        layout: KvLayout,
        pool: BlockPool,
        transports: TransportSet,
        identity: LinkIdentity,
        clock: Clock,
        events: Callable[[ReceiverEvent], None],
    ) -> None:
        raise NotImplementedError

    def start(self) -> None:
        """Binds to the running loop: from now on transports wake it and deadlines are kept."""

    def room_freed(self) -> None:
        """Blocks were released: waiting reservations are granted in order of arrival. Cheap when none waits."""

    def abort(self, key: HandoffKey, error: DiphaseError) -> None:
        """Ends a hand-off in whatever state; unknown keys are fine. No event follows."""

    def peer_lost(self, incarnation: str, message: str) -> None:
        """Someone knows that this process is gone: its hand-offs fail now."""

    def pump(self) -> None:
        """Handles transport events, digests and deadlines; called by itself once started."""

    @property
    def in_flight(self) -> int:
        """Hand-offs not over yet, quarantined ones included."""
        raise NotImplementedError

    @property
    def waiting(self) -> int:
        """Reservations that wait for room."""
        raise NotImplementedError

    @property
    def reserved_blocks(self) -> int:
        """Blocks granted to hand-offs that are not Ready."""
        raise NotImplementedError

    @property
    def quarantined_blocks(self) -> int:
        raise NotImplementedError

    def refuse_new(self) -> None:
        """Draining: reservations that come from now on are refused; those in flight go on."""

    async def drain(self) -> None:
        """refuse_new, then returns when nothing is in flight."""

    async def close(self) -> None:
        """Ends every hand-off, link and task. The transports are the caller's to close, afterwards."""
