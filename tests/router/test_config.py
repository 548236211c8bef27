"""The router's configuration: ranges, and sentences that say what to change."""

from __future__ import annotations

import re

import pytest
from diphase.proto.errors import ConfigError
from diphase.proto.slo import Priority
from diphase.router.config import GatewayConfig, RouterConfig, SloConfig, is_loopback


@pytest.mark.parametrize(
    ("section", "fields", "message"),
    [
        (GatewayConfig, {"replicas": 0}, "gateway.replicas = 0"),
        (GatewayConfig, {"port": 70000}, "gateway.port = 70000"),
        (GatewayConfig, {"host": ""}, "gateway.host"),
        (GatewayConfig, {"max_message_bytes": 10}, "gateway.max_message_bytes"),
        (GatewayConfig, {"max_open_requests": 0}, "gateway.max_open_requests"),
        (RouterConfig, {"admission": "maybe"}, '"queue" or "slo"'),
        (
            RouterConfig,
            {"policy": "random"},
            'router.policy = "random" is unknown; use one of "goodput", "dist',
        ),
        (RouterConfig, {"max_attempts": 0}, "router.max_attempts"),
        (RouterConfig, {"max_queued_requests": -1}, "router.max_queued_requests"),
        (RouterConfig, {"max_queued_tokens": 0}, "router.max_queued_tokens"),
        (RouterConfig, {"hang_after_s": float("nan")}, "router.hang_after_s"),
        (SloConfig, {"ttft_ms": -1.0}, "slo.ttft_ms"),
        (SloConfig, {"tpot_ms": 1e12}, "slo.tpot_ms"),
        (SloConfig, {"priority": "urgent"}, "batch, standard and interactive"),
    ],
)
def test_wrong_values_are_config_errors(section: type, fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        section(**fields)


def test_the_default_objectives() -> None:
    slo = SloConfig(ttft_ms=500.0, priority="interactive").slo()
    assert (slo.ttft_ms, slo.tpot_ms, slo.priority) == (500.0, 100.0, Priority.INTERACTIVE)


def test_what_is_loopback() -> None:
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "127.1.2.3")] == [True] * 4
    assert [is_loopback(host) for host in ("0.0.0.0", "::", "10.0.0.1", "example.org")] == [False] * 4
