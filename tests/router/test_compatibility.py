"""Who can hand over to whom, by what registry and hellos say."""

from __future__ import annotations

from dataclasses import replace

from diphase.proto.worker_pb2 import WorkerHello
from diphase.router.compatibility import Mismatch, mismatches, obstacle
from diphase.router.latency_model import LatencyModel
from diphase.router.membership import Member
from diphase.router.worker_handle import WorkerHandle, WorkerState

PREFILL = Member(
    worker_id="p0", role="prefill", address="p0:1", incarnation="1",
    layout_hash="aaaa", protocol_version=1, kv_sharding="tp2 pp1", package_version="1.0",
)  # fmt: skip
DECODE = replace(PREFILL, worker_id="d0", role="decode", kv_sharding="tp1 pp1")


def handle(member: Member) -> WorkerHandle:
    return WorkerHandle(member, LatencyModel())


def test_equal_layouts_fit_whatever_their_sharding() -> None:
    assert obstacle(handle(PREFILL), handle(DECODE)) == ""


def test_what_is_not_known_yet_is_no_obstacle() -> None:
    assert obstacle(handle(PREFILL), handle(replace(DECODE, layout_hash=""))) == ""


def test_another_layout_is_known_before_there_is_a_stream() -> None:
    prefill, decode = handle(PREFILL), handle(replace(DECODE, layout_hash="bbbb"))
    assert obstacle(prefill, decode) == "KV layouts aaaa and bbbb"
    prefill.on_hello(WorkerHello(layout_hash="aaaa", protocol_version=1, block_size=32))
    assert obstacle(prefill, decode) == "KV layouts aaaa (blocks of 32) and bbbb"


def test_the_hello_is_right_where_the_registry_is_late() -> None:
    decode = handle(replace(DECODE, layout_hash="bbbb"))
    decode.on_hello(WorkerHello(layout_hash="aaaa", protocol_version=1, block_size=16))
    assert obstacle(handle(PREFILL), decode) == ""
    # A stream that is gone may come back from another process, of which the registry knows.
    decode.detached(WorkerState.CONNECTING)
    assert decode.adopt(replace(DECODE, incarnation="2", layout_hash="cccc"))
    assert obstacle(handle(PREFILL), decode) == "KV layouts aaaa and cccc"


def test_another_protocol_is_told_with_the_releases() -> None:
    decode = handle(replace(DECODE, protocol_version=2, package_version="2.0"))
    assert obstacle(handle(PREFILL), decode) == "protocol 1 (diphase 1.0) and 2 (diphase 2.0)"


def test_every_pair_that_does_not_fit_is_told_and_colocated_workers_are_in_none() -> None:
    odd = replace(DECODE, worker_id="d1", layout_hash="bbbb")
    alone = replace(odd, worker_id="c0", role="colocated")
    found = list(mismatches([handle(member) for member in (PREFILL, DECODE, odd, alone)]))
    assert found == [Mismatch("p0", "d1", "KV layouts aaaa and bbbb")]
