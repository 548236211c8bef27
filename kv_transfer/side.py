"""One process's end of the hand-off: what its sender or receiver is built on."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from ..proto.clock import Clock
from ..proto.errors import ConfigError
from ..proto.kv_layout import UNSHARDED, KvLayout, Sharding
from .base import Region
from .coders import Coders
from .config import MIB, KvTransferConfig
from .link import LinkIdentity
from .pool_bytes import PoolBytes
from .registry import TransportSet, open_transports
from .staging_memory import StagingMemory


@dataclass(frozen=True, slots=True, kw_only=True)
class HandoffSide:
    """Shared by nobody; its transports have to be closed."""

    config: KvTransferConfig
    layout: KvLayout
    transports: TransportSet
    identity: LinkIdentity
    clock: Clock
    coders: Coders

    @property
    def sharding(self) -> Sharding:
        return self.identity.sharding

    def pool_bytes(self) -> PoolBytes:
        """The worker's pools, as the byte worker reads them."""
        return PoolBytes(self.layout, self.sharding, [pool.host_bytes() for pool in self.transports.pools])


def open_side(
    config: KvTransferConfig,
    *,
    worker_id: str,
    incarnation: str,
    cluster_token: str,
    layout: KvLayout,
    pools: Sequence[Region],
    clock: Clock,
    parts: ExitStack,
    sharding: Sharding = UNSHARDED,
) -> HandoffSide:
    """The end of a live worker whose KV pools, one for each rank, are `pools`. What has to be closed is
    pushed onto `parts`.

    Raises:
        ConfigError: the configured transport is unknown, the host is no address of this machine, or there is
            no room for the staging buffer.
        TransferError: it does not work here, or none does.
    """
    identity = LinkIdentity(
        worker_id=worker_id,
        incarnation=incarnation,
        layout_hash=layout.fingerprint(),
        cluster_token=cluster_token,
        sharding=sharding,
    )
    staging = None
    if config.staging_mib and config.staging != "never":
        try:
            memory = StagingMemory(config.staging_mib * MIB)
        except OSError as error:
            raise ConfigError(
                f"kv_transfer.staging_mib = {config.staging_mib} is more than this machine gives a worker: "
                f"{error.strerror}; lower it"
            ) from error
        parts.callback(memory.close)
        staging = memory.region
    transports = open_transports(
        config, incarnation=incarnation, pools=pools, staging=staging, clock=clock, token=cluster_token
    )
    parts.callback(transports.close)
    return HandoffSide(
        config=config,
        layout=layout,
        transports=transports,
        identity=identity,
        clock=clock,
        coders=Coders(config.codecs, layout, clock),
    )
