"""One process's end of the hand-off: what its sender or receiver is built on."""

from __future__ import annotations

from dataclasses import dataclass

from ..proto.clock import Clock
from ..proto.kv_layout import KvLayout
from .base import Region
from .config import KvTransferConfig
from .link import LinkIdentity
from .registry import TransportSet, open_transports


@dataclass(frozen=True, slots=True, kw_only=True)
class HandoffSide:
    """Shared by nobody; its transports have to be closed."""

    config: KvTransferConfig
    layout: KvLayout
    transports: TransportSet
    identity: LinkIdentity
    clock: Clock


def open_side(
    config: KvTransferConfig,
    *,
    worker_id: str,
    incarnation: str,
    cluster_token: str,
    layout: KvLayout,
    region: Region,
    clock: Clock,
) -> HandoffSide:
    """The end of a live worker whose KV pool is `region`.

    Raises:
        ConfigError: the configured transport is unknown, or the host is no address of this machine.
        TransferError: it does not work here, or none does.
    """
    identity = LinkIdentity(
        worker_id=worker_id,
        incarnation=incarnation,
        layout_hash=layout.fingerprint(),
        cluster_token=cluster_token,
    )
    transports = open_transports(
        config, incarnation=incarnation, region=region, clock=clock, token=cluster_token
    )
    return HandoffSide(config=config, layout=layout, transports=transports, identity=identity, clock=clock)
