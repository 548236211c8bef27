"""What can be set of a worker's shell, whatever its role."""

from __future__ import annotations

from dataclasses import dataclass

from ..proto.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class HostConfig:
    """Section [host] of a worker."""

    host: str = "127.0.0.1"
    """Address that the gRPC service and /metrics listen on. Beyond loopback a cluster token is required."""
    port: int = 0
    """TCP port of the gRPC service; 0 takes a free one."""
    metrics_port: int = 0
    """TCP port of /metrics; 0 takes a free one."""
    cluster_token: str = ""
    """Secret that gateways and workers of one cluster share; empty: none is asked for."""
    heartbeat_s: float = 0.25
    """Seconds between heartbeats, which flow while a step runs."""
    hello_timeout_s: float = 5.0
    """Seconds that a new stream has to say hello."""
    retain_s: float = 60.0
    """Seconds that the tokens of an ended request are kept for a gateway that has not acknowledged them."""
    max_retained: int = 8192
    """Most ended requests that are kept; beyond it the oldest are forgotten."""
    orphan_s: float = 10.0
    """Seconds after which requests whose gateway has no stream are cancelled."""
    max_queued_messages: int = 4096
    """Most messages that may wait for a gateway to read; then it is disconnected."""
    drain_timeout_s: float = 20.0
    """Seconds that a draining worker has to finish what it runs; then its requests go to other workers. Below
    the grace that whoever stops processes gives them (Kubernetes: 30)."""
    flush_s: float = 2.0
    """Seconds that a draining worker waits for gateways to read their last messages."""

    def __post_init__(self) -> None:
        if not self.host:
            raise ConfigError("host.host is empty; use an address of this machine, such as 127.0.0.1")
        for name in ("port", "metrics_port"):
            if not 0 <= getattr(self, name) <= 65535:
                raise ConfigError(f"host.{name} = {getattr(self, name)} is out of range; use 0 to 65535")
        for name in (
            "heartbeat_s", "hello_timeout_s", "retain_s", "orphan_s", "drain_timeout_s", "flush_s",
        ):  # fmt: skip
            if not 0.0 < getattr(self, name) <= 86_400.0:
                raise ConfigError(
                    f"host.{name} = {getattr(self, name)} is out of range; use more than 0 and at most 86400"
                )
        for name in ("max_retained", "max_queued_messages"):
            if getattr(self, name) < 1:
                raise ConfigError(f"host.{name} = {getattr(self, name)} must be at least 1")
        if self.host not in ("127.0.0.1", "localhost", "::1") and not self.cluster_token:
            raise ConfigError(
                f"host.host = {self.host} listens beyond this machine and needs security.cluster_token"
            )
