"""Addresses, and channel and server options, of every gRPC socket of the project."""

from __future__ import annotations

MAX_MESSAGE_BYTES = 16 * 1024 * 1024
"""Largest message on worker and hand-off streams (a prompt of a million tokens, or a snapshot)."""

INTERNAL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # gRPC sets TCP_NODELAY itself on every TCP socket; benchmarks/gateway.py looks for 40 ms stalls.
    ("grpc.so_reuseport", 0),
    ("grpc.enable_retries", 0),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.use_local_subchannel_pool", 1),
)


def host_port(host: str, port: int) -> str:
    """An address as gRPC and URLs take it: [::1]:50051 where the host is an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def server_options(max_message_bytes: int) -> tuple[tuple[str, int], ...]:
    """Options of a server that strangers reach: `max_message_bytes` bounds one request."""
    return (
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.so_reuseport", 0),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    )
