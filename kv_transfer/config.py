"""What can be configured about the hand-off. Nothing here knows requests or models."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..proto.errors import ConfigError
from .codecs.codec import CODECS, RAW, load_codecs

MIB = 1024 * 1024
MAX_TCP_SOCKETS = 16
"""Connections that a peer may make."""
IN_PROCESS = "local"
"""The transport that joins roles of one process: who composes them gives it a hub; nobody configures it."""
TRANSPORTS: Mapping[str, str] = {
    IN_PROCESS: "diphase.kv_transfer.transports.local:LocalTransport",
    "cuda_ipc": "diphase.kv_transfer.transports.cuda_ipc:CudaIpcTransport",
    "shm": "diphase.kv_transfer.transports.shm:ShmTransport",
    "nixl": "diphase.kv_transfer.transports.nixl:NixlTransport",
    "nccl": "diphase.kv_transfer.transports.nccl:NcclTransport",
    "tcp": "diphase.kv_transfer.transports.tcp:TcpTransport",
}
"""Name to "module:Class", best first: the order in which "auto" prefers them."""
TRANSPORT_CHOICES = ("auto", *(name for name in TRANSPORTS if name != IN_PROCESS))
STAGING = ("auto", "always", "never")


@dataclass(frozen=True, slots=True, kw_only=True)
class KvTransferConfig:
    """Section [kv_transfer]."""

    transport: str = field(default="auto", metadata={"choices": TRANSPORT_CHOICES})
    """How blocks move; "auto": over the best transport that both ends have."""
    layerwise_tokens: int = 1024
    """Prompts of at least this many tokens push each chunk of layers as soon as it is computed; shorter ones
    go whole. 0 pushes every prompt layer by layer."""
    layers_per_push: int = 10
    """Layers that a layer-wise push gathers."""
    max_push_bytes: int = 8 * MIB
    """A push larger than this is split, so that progress shows on slow networks; never below one block."""
    staging: str = "auto"
    """Which parts are gathered into one piece first: "auto" those whose runs are shorter than the transport
    likes, "always" or "never"."""
    staging_mib: int = 64
    """Staging buffer of a worker, MiB; pages are taken when they are used. 0: nothing is staged."""
    staging_window_mib: int = 16
    """What a decode worker lends each prefill worker of its staging buffer, MiB."""
    codecs: tuple[str, ...] = field(
        default=(), metadata={"choices": tuple(name for name in CODECS if name != RAW)}
    )
    """Codecs beside raw that a hand-off may use where the link is so slow that they pay. All of them
    change the KV, and with it what the model says (benchmarks/codecs.py)."""
    recompute: bool = True
    """Whether a decode worker computes the prompt itself where that is quicker than the measured link."""
    digest: bool = True
    """Whether every pushed block carries an xxh3_64 digest that the decode side verifies before it may
    run."""
    reserve_timeout_s: float = 5.0
    """How long the prefill side waits for any answer to its reservation, dialling included, seconds."""
    lease_s: float = 30.0
    """How long the prefill side holds KV without news from a decode side that has no room, seconds."""
    progress_timeout_s: float = 2.0
    """Either side gives up when nothing was computed or moved for this long, seconds."""
    tail_timeout_s: float = 10.0
    """Either side gives up this long after the last layer was computed, whatever moves, seconds."""
    max_waiting: int = 1024
    """Reservations that may wait for room on a decode worker; more are refused."""
    host: str = "127.0.0.1"
    """Address that network transports listen on and announce to their peers."""
    tcp_sockets: int = 4
    """Connections that the tcp transport makes to each peer and stripes transfers of 2 MiB or more over; more
    than one where the network gives a single connection less than the link has."""

    def __post_init__(self) -> None:
        if not self.transport:
            raise ConfigError('kv_transfer.transport is empty; use "auto" or the name of a transport')
        if self.transport == IN_PROCESS:
            raise ConfigError(
                f'kv_transfer.transport = "{IN_PROCESS}" joins roles of one process, and every worker is a '
                'process of its own; use "auto" or the name of another transport'
            )
        if self.transport not in TRANSPORTS and self.transport != "auto":
            raise unknown_transport(self.transport)
        if not _dialable(self.host):
            raise ConfigError(
                f"kv_transfer.host = {self.host!r} is no address that a peer could dial; "
                "use one of this machine's"
            )
        if not 1 <= self.tcp_sockets <= MAX_TCP_SOCKETS:
            raise ConfigError(
                f"kv_transfer.tcp_sockets = {self.tcp_sockets} is out of range; use 1 to {MAX_TCP_SOCKETS}"
            )
        for name, least in (
            ("layerwise_tokens", 0),
            ("layers_per_push", 1),
            ("max_push_bytes", 1),
            ("max_waiting", 0),
            ("staging_mib", 0),
            ("staging_window_mib", 1),
        ):
            if getattr(self, name) < least:
                raise ConfigError(
                    f"kv_transfer.{name} = {getattr(self, name)} is too small; use {least} or more"
                )
        if self.staging not in STAGING:
            raise ConfigError(
                f"kv_transfer.staging = {self.staging!r} is unknown; use one of {', '.join(STAGING)}"
            )
        self._check_staging()
        try:
            load_codecs(self.codecs)
        except ConfigError as error:
            raise ConfigError(f"kv_transfer.codecs = {list(self.codecs)}: {error.message}") from error
        for name in ("reserve_timeout_s", "lease_s", "progress_timeout_s", "tail_timeout_s"):
            if not 0.0 < getattr(self, name) <= 3600.0:
                raise ConfigError(
                    f"kv_transfer.{name} = {getattr(self, name)} is out of range; "
                    "use more than 0 and at most 3600"
                )

    def _check_staging(self) -> None:
        """
        Raises:
            ConfigError: something is asked for that goes by way of the staging buffer, and there is none, or
                none that a window fits into.
        """
        if self.staging == "never" or not self.staging_mib:
            setting = 'staging = "never"' if self.staging == "never" else "staging_mib = 0"
            if self.staging == "always":
                raise ConfigError(
                    'kv_transfer.staging = "always" contradicts kv_transfer.staging_mib = 0; raise '
                    'staging_mib, or use staging = "never"'
                )
            if set(self.codecs) - {RAW}:
                raise ConfigError(
                    f"kv_transfer.codecs = {list(self.codecs)} contradicts kv_transfer.{setting}, since "
                    "codecs write into the staging buffer; allow staging, or empty codecs"
                )
        elif self.staging_window_mib > self.staging_mib:
            raise ConfigError(
                f"kv_transfer.staging_window_mib = {self.staging_window_mib} does not fit into "
                f"kv_transfer.staging_mib = {self.staging_mib}: no prefill worker would get a window; "
                "lower the one or raise the other"
            )


def unknown_transport(name: str) -> ConfigError:
    """The refusal of a name that no transport has."""
    return ConfigError(
        f"kv_transfer.transport = {name!r} is unknown; use one of {', '.join(TRANSPORT_CHOICES)}"
    )


def _dialable(host: str) -> bool:
    """False for addresses that mean no machine, or many; names are resolved where they are used."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return bool(host)
    return not (address.is_unspecified or address.is_multicast or host == "255.255.255.255")
