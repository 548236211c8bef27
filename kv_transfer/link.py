"""Control links between a prefill worker (which dials) and a decode worker: what they promise, and who may
pair.

A link carries HandoffMessages both ways in order, or goes down. It knows no hand-offs. grpc_link.py is the
live one, memory_link.py the one of tests and simulation.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from ..proto.errors import ConfigError, DiphaseError, TransferError, Unauthenticated
from ..proto.handoff_pb2 import HandoffMessage, PeerHello
from ..proto.ids import PROTOCOL_VERSION
from ..proto.kv_layout import UNSHARDED, KvLayout, Sharding


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkIdentity:
    """What a worker says of itself in every handshake."""

    worker_id: str
    incarnation: str
    """Drawn at process start; names the process to its peers."""
    layout_hash: str
    """KvLayout.fingerprint()."""
    cluster_token: str = ""
    protocol_version: int = PROTOCOL_VERSION
    sharding: Sharding = UNSHARDED
    """How its pool is cut."""

    def hello(
        self, endpoints: Mapping[str, bytes], transport: str = "", codecs: Sequence[str] = ()
    ) -> PeerHello:
        """The first message of a link: the dialer offers endpoints and codecs, the answer has the chosen
        ones."""
        return PeerHello(
            worker_id=self.worker_id,
            incarnation=self.incarnation,
            cluster_token=self.cluster_token,
            protocol_version=self.protocol_version,
            layout_hash=self.layout_hash,
            endpoints=endpoints,
            transport=transport,
            tensor_parallel=self.sharding.tp,
            pipeline_parallel=self.sharding.pp,
            codecs=codecs,
        )


def check_hello(ours: LinkIdentity, theirs: PeerHello) -> None:
    """Whether two workers may pair.

    Raises:
        Unauthenticated: the cluster token is another one.
        TransferError: protocol version or KV layout differ; the message names both values.
    """
    if not hmac.compare_digest(ours.cluster_token.encode(), theirs.cluster_token.encode()):
        raise Unauthenticated("the hand-off link has a wrong cluster token; give both workers the same one")
    if ours.protocol_version != theirs.protocol_version:
        raise TransferError(
            f"worker {theirs.worker_id} speaks hand-off protocol {theirs.protocol_version}, "
            f"worker {ours.worker_id} speaks {ours.protocol_version}; run the same release on both"
        )
    if ours.layout_hash != theirs.layout_hash:
        raise TransferError(
            f"worker {theirs.worker_id} has KV layout {theirs.layout_hash}, worker {ours.worker_id} has "
            f"{ours.layout_hash}; give both the same model, dtype and block size"
        )
    if not theirs.incarnation:
        raise TransferError(f"worker {theirs.worker_id or '?'} says no incarnation in its hello")


def sharding_of(hello: PeerHello, layout: KvLayout) -> Sharding:
    """How the pool of a worker is cut that has this layout too.

    Raises:
        TransferError: this layout cannot be cut so.
    """
    try:
        sharding = Sharding(tp=hello.tensor_parallel, pp=hello.pipeline_parallel)
        sharding.check(layout)
    except ConfigError as error:
        raise TransferError(f"worker {hello.worker_id} has an impossible pool: {error.message}") from error
    return sharding


class ControlLink(Protocol):
    """One end of a link. Used on the event loop only."""

    def send(self, message: HandoffMessage) -> None:
        """Queues a message; those of one turn of the loop go in one frame. Nothing happens once it is down:
        the user has been or will be told by link_down."""
        ...

    def close(self) -> None:
        """Ends the link. Idempotent; link_down is not called for it at this end."""
        ...


class LinkUser(Protocol):
    """Who is at one end of links. Called on the event loop, never from inside send or close."""

    def link_messages(self, link: ControlLink, messages: Sequence[HandoffMessage]) -> None: ...

    def link_down(self, link: ControlLink, error: DiphaseError) -> None:
        """The last call for this link: it ended, or never came up."""
        ...


class LinkCaller(LinkUser, Protocol):
    """The dialling end."""

    def link_up(self, link: ControlLink, hello: PeerHello) -> None:
        """The other end's answer.

        Raises:
            DiphaseError: it is not acceptable; the link closes and link_down is called with the error.
        """
        ...


class LinkAcceptor(LinkUser, Protocol):
    """The listening end."""

    def accept(self, link: ControlLink, hello: PeerHello) -> PeerHello:
        """Our answer to a dialer's hello.

        Raises:
            Unauthenticated: wrong token.
            DiphaseError: these two cannot pair; the dialer is told.
        """
        ...


class Dialer(Protocol):
    """Opens links."""

    def dial(self, address: str, hello: PeerHello, caller: LinkCaller, timeout_s: float) -> ControlLink:
        """Starts dialling and returns at once; messages may be sent immediately and follow the hello. Exactly
        one of link_up and link_down comes within `timeout_s`."""
        ...

    async def close(self) -> None:
        """Ends every link and task. Idempotent."""
        ...
