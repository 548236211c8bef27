"""What can be set about gateway and router: sections [gateway], [router] and [slo] of the configuration."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..proto.errors import ConfigError, InvalidRequest
from ..proto.rpc import MAX_MESSAGE_BYTES
from ..proto.slo import Priority, Slo

ADMISSIONS = ("queue", "slo")
POLICIES: Mapping[str, str] = {
    "goodput": "diphase.router.goodput_policy:GoodputPolicy",
    "distserve": "diphase.router.distserve_policy:DistServePolicy",
    "splitwise": "diphase.router.splitwise_policy:SplitwisePolicy",
}
"""Placement policies: name to "module:Class"."""


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a listener on `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _check(section: str, name: str, value: float, low: float, high: float = 1e9) -> None:
    if not low <= value <= high:
        raise ConfigError(f"{section}.{name} = {value} is out of range; use {low:g} to {high:g}")


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayConfig:
    """The endpoint that clients reach."""

    replicas: int = 1
    """Gateways of the cluster; replica i listens on port + i."""
    host: str = "127.0.0.1"
    """Address to listen on. Beyond loopback a cluster token is required, of workers and of clients."""
    port: int = 50051
    """Of the first replica; 0 takes any free port."""
    metrics_port: int = 0
    """Of /metrics of the first replica; 0 takes any free port."""
    max_message_bytes: int = 4 * 1024 * 1024
    """Largest request a client may send, bytes."""
    max_open_requests: int = 4096
    """Requests in any state, those whose client reads slowly included: bounds the gateway's memory."""
    client_stall_s: float = 60.0
    """A client that reads nothing for so long has gone: its request is cancelled. Seconds."""
    drain_s: float = 60.0
    """How long drain() waits for running requests, seconds."""

    def __post_init__(self) -> None:
        _check("gateway", "replicas", self.replicas, 1, 256)
        _check("gateway", "port", self.port, 0, 65535)
        _check("gateway", "metrics_port", self.metrics_port, 0, 65535)
        _check("gateway", "max_message_bytes", self.max_message_bytes, 1024, MAX_MESSAGE_BYTES)
        _check("gateway", "max_open_requests", self.max_open_requests, 1)
        _check("gateway", "client_stall_s", self.client_stall_s, 0.1)
        _check("gateway", "drain_s", self.drain_s, 0.0)
        if not self.host:
            raise ConfigError("gateway.host is empty; use 127.0.0.1, or 0.0.0.0 to listen on every interface")


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig:
    """Admission, placement and the bounds of what a gateway keeps."""

    admission: str = "queue"
    """queue: only the hard limits reject. slo: what no placement can serve in time is rejected at once."""
    max_queued_requests: int = 1024
    """Requests of one gateway that wait for their first token."""
    max_queued_tokens: int = 1_000_000
    """Their prompt tokens together."""
    max_attempts: int = 3
    """Attempts at one request before its last failure is the client's."""
    wait_for_workers_s: float = 5.0
    """How long an accepted request waits for a placement to become possible, seconds."""
    policy: str = field(default="goodput", metadata={"choices": tuple(POLICIES)})
    """Who chooses the workers of a request. goodput: where the most is left of its objectives and of memory.
    distserve: the fewest requests in each pool. splitwise: the fewest pending prompt tokens, the least
    memory, and a mixed pool for what finds no room."""
    local_prefill_tokens: int = 64
    """A prompt with at most so many uncached tokens may be computed by a decode worker. The other policies
    than goodput take no notice of it."""
    hang_after_s: float = 1.3
    """Silence after which a worker counts as hung, seconds; it is noticed up to 0.1 s later."""
    resume_timeout_s: float = 2.0
    """How long a re-attach waits for the workers' answers, seconds."""
    expected_output_tokens: int = 128
    """Length of a completion while none has been seen; measured lengths replace it."""
    max_prefix_blocks: int = 200_000
    """Block hashes kept for each worker, about 100 bytes each; the oldest are forgotten."""
    max_journal_pending: int = 20_000
    """Journal records that wait to be written; beyond it the oldest are dropped and counted."""
    journal_flush_s: float = 0.02
    """Records of one request within this time become one write, seconds."""
    journal_ttl_s: int = 3600
    """Redis forgets a request's record after this, seconds."""

    def __post_init__(self) -> None:
        if self.admission not in ADMISSIONS:
            raise ConfigError(f'router.admission = "{self.admission}" is unknown; use "queue" or "slo"')
        if self.policy not in POLICIES:
            names = ", ".join(f'"{name}"' for name in POLICIES)
            raise ConfigError(f'router.policy = "{self.policy}" is unknown; use one of {names}')
        _check("router", "max_queued_requests", self.max_queued_requests, 1)
        _check("router", "max_queued_tokens", self.max_queued_tokens, 1)
        _check("router", "max_attempts", self.max_attempts, 1, 100)
        _check("router", "wait_for_workers_s", self.wait_for_workers_s, 0.0)
        _check("router", "local_prefill_tokens", self.local_prefill_tokens, 0)
        _check("router", "hang_after_s", self.hang_after_s, 0.2)
        _check("router", "resume_timeout_s", self.resume_timeout_s, 0.1)
        _check("router", "expected_output_tokens", self.expected_output_tokens, 1)
        _check("router", "max_prefix_blocks", self.max_prefix_blocks, 1)
        _check("router", "max_journal_pending", self.max_journal_pending, 1)
        _check("router", "journal_flush_s", self.journal_flush_s, 0.001, 10.0)
        _check("router", "journal_ttl_s", self.journal_ttl_s, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class SloConfig:
    """Objectives of requests that name none."""

    ttft_ms: float = 2000.0
    """Receipt at the gateway to token 0 written to the client, milliseconds."""
    tpot_ms: float = 100.0
    """Mean time for each token after the first, milliseconds."""
    priority: str = "standard"
    """batch, standard or interactive."""

    def __post_init__(self) -> None:
        try:
            self.slo()
        except (KeyError, InvalidRequest) as exc:
            detail = (
                exc.message
                if isinstance(exc, InvalidRequest)
                else f'slo.priority = "{self.priority}" is unknown'
            )
            raise ConfigError(f"{detail}; priorities are batch, standard and interactive") from exc

    def slo(self) -> Slo:
        return Slo(ttft_ms=self.ttft_ms, tpot_ms=self.tpot_ms, priority=Priority[self.priority.upper()])
