"""The prefill side of hand-offs: drives one machine a hand-off. Runs on the event loop only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..proto.clock import Clock
from ..proto.errors import DiphaseError
from ..proto.ids import HandoffKey
from ..proto.inference_pb2 import TokenLogprobs
from ..proto.kv_layout import KvLayout
from ..proto.worker_pb2 import PeerAddress, Submit
from .config import KvTransferConfig
from .link import Dialer, LinkIdentity
from .pool import BlockPool
from .registry import TransportSet


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """The decode worker has verified everything: the request is its own now. The sender's references are given back."""

    key: HandoffKey


@dataclass(frozen=True, slots=True, kw_only=True)
class SendFailed:
    """The hand-off is over for a reason that is not the owner's; not reported after abort() or finish().

    The sender's references are given back by itself as soon as no transfer can read the blocks any more.
    """

    key: HandoffKey
    error: DiphaseError


SenderEvent = Sent | SendFailed


class HandoffSender:
    """All hand-offs that leave this process. `events` is called on the loop, never from inside one of the calls
    below except pump()."""

    def __init__(
        self,
        *,
        config: KvTransferConfig,
        layout: KvLayout,
        pool: BlockPool,
        transports: TransportSet,
        dialer: Dialer,
        identity: LinkIdentity,
        clock: Clock,
        events: Callable[[SenderEvent], None],
    ) -> None:
        raise NotImplementedError

    def start(self) -> None:
        """Binds to the running loop: from now on transports wake it and deadlines are kept."""

    def begin(
        self,
        key: HandoffKey,
        peer: PeerAddress,
        submit: Submit,
        num_tokens: int,
        block_hashes: Sequence[bytes] = (),
    ) -> None:
        """Asks the decode worker `peer` for room; call when the first chunk of the prompt is scheduled.

        `num_tokens` tokens of KV will be sent (prompt and earlier attempts' tokens); `block_hashes` are those of their full
        blocks, so that what the decode side has cached is not sent. `submit` is passed on unchanged (elapsed_s is brought
        up to date). Dials the peer if there is no link yet. Failures come as events.

        Raises:
            ValueError: the key is in flight already.
        """

    def layers_per_push(self, key: HandoffKey) -> int:
        """After how many layers of a step computed() should be called; layout.num_layers: once a step is enough."""
        raise NotImplementedError

    def computed(
        self,
        key: HandoffKey,
        block_ids: Sequence[int],
        num_tokens: int,
        first_layer: int = 0,
        num_layers: int | None = None,
    ) -> None:
        """The KV of the first `num_tokens` tokens is in `block_ids` for these layers (None: all from first_layer on).

        Takes a reference to each block that it was not told of before. Does nothing for a hand-off that is over.
        """

    def seeded(
        self,
        key: HandoffKey,
        token_id: int,
        token_at: float,
        logprobs: TokenLogprobs | None = None,
    ) -> None:
        """The prompt is computed and its first token sampled: what is left is pushed, then the decode side may run.

        The caller may release its own references to the blocks at once. Does nothing for a hand-off that is over.
        """

    def finish(self, key: HandoffKey) -> None:
        """The first token ended the request: the reservation is given back and no KV moves. No event follows."""

    def abort(self, key: HandoffKey, error: DiphaseError) -> None:
        """Ends a hand-off in whatever state; unknown keys are fine. No event follows."""

    def peer_lost(self, incarnation: str, message: str) -> None:
        """Someone knows that this process is gone: its hand-offs fail now."""

    def pump(self) -> None:
        """Handles transport events, digests and deadlines; called by itself once started."""

    @property
    def in_flight(self) -> int:
        """Hand-offs that still hold blocks or await an answer, leases included."""
        raise NotImplementedError

    @property
    def held_blocks(self) -> int:
        """References to blocks that hand-offs hold."""
        raise NotImplementedError

    async def drain(self) -> None:
        """Returns when nothing is in flight. Cancelling it changes nothing."""

    async def close(self) -> None:
        """Ends every hand-off, link and task. The transports are the caller's to close, afterwards."""
