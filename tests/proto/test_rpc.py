"""How addresses are written."""

from __future__ import annotations

import pytest
from diphase.proto.rpc import host_port


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("127.0.0.1", "127.0.0.1:5"),
        ("localhost", "localhost:5"),
        ("::1", "[::1]:5"),
        ("fe80::1", "[fe80::1]:5"),
    ],
)
def test_only_ipv6_addresses_are_bracketed(host: str, address: str) -> None:
    assert host_port(host, 5) == address
