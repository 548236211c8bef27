"""Hand-offs over slow links: coded, or not sent at all."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from diphase.kv_transfer.codecs.codec_choice import LinkEstimate
from diphase.proto.handoff_pb2 import Pushed, Staged
from diphase.proto.ids import HandoffKey
from numpy.typing import NDArray

from .handoff_checks import error_codes, idle
from .test_handoff import KEY, OTHER, send
from .test_staged_handoff import nothing_is_staged

FIRST = HandoffKey("first", 0)


class Measured(LinkEstimate):
    """A link that was measured."""

    def __init__(self, bytes_per_s: float) -> None:
        super().__init__()
        self._measured = bytes_per_s

    def bytes_per_s(self, now: float) -> float | None:
        return self._measured

    settled_bytes_per_s = bytes_per_s


def connected(pair: Any, bytes_per_s: float) -> None:
    """A session that has moved something before, over a link of this speed."""
    send(pair, FIRST)
    pair.pump()
    [ready] = pair.received()
    pair.d.pool.release(ready.block_ids)
    pair.d.events.clear()
    pair.p.events.clear()
    [session] = pair.sender._sessions.values()
    session.estimate = Measured(bytes_per_s)


def send_values(pair: Any, num_tokens: int) -> tuple[list[int], NDArray[np.float32]]:
    """A prompt whose KV is what a model could have computed."""
    blocks = pair.begin(KEY, num_tokens)
    rng = np.random.default_rng(1)
    values = rng.standard_normal(len(blocks) * pair.layout.block_bytes // 2, dtype=np.float32)
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    pair.bytes_of(pair.p).scatter(memoryview(bits).cast("B"), blocks, 0, 4)
    pair.sender.computed(KEY, blocks, num_tokens)
    pair.sender.seeded(KEY, 42, 3.0)
    pair.p.pool.release(blocks)
    return blocks, values_of(bits.tobytes())


def values_of(data: bytes) -> NDArray[np.float32]:
    return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)


@pytest.mark.parametrize("codec", ["int8", "fp8", "cachegen-3"])
async def test_over_a_slow_link_the_allowed_codec_shrinks_what_is_sent(make_pair: Any, codec: str) -> None:
    pair = make_pair(num_blocks=64, codecs=(codec,))
    connected(pair, 1e4)
    _, wanted = send_values(pair, 130)
    before = wire_bytes(pair)
    pair.pump()
    [ready] = pair.received()
    assert ready.num_bytes == 33 * pair.layout.block_bytes, "of KV"
    found = values_of(pair.read(pair.d, ready.block_ids))
    used = slice(0, 128 * pair.layout.token_bytes // 2)
    assert np.abs(found[used] - wanted[used]).max() < 0.35
    assert not np.array_equal(found, wanted), "this codec is lossy"
    assert wire_bytes(pair) - before < 0.8 * ready.num_bytes
    assert pair.sender._coders.estimates[codec].ratio > 1.2, "measured on what was sent"
    assert any(event.name == "choice" and codec in event.detail for event in pair.sender.traces.events("r"))
    assert nothing_is_staged(pair)
    assert idle(pair)


def wire_bytes(pair: Any) -> int:
    return int(pair.sender.counters.total().wire_bytes)


async def test_a_quick_link_brings_every_byte_as_it_is(make_pair: Any) -> None:
    pair = make_pair(num_blocks=64, codecs=("int8",))
    connected(pair, 1e12)
    blocks, _ = send_values(pair, 130)
    pair.pump()
    [ready] = pair.received()
    assert pair.read(pair.d, ready.block_ids) == pair.read(pair.p, blocks)


async def test_a_codec_that_only_one_end_may_use_is_never_used(make_pair: Any) -> None:
    pair = make_pair(num_blocks=64)
    assert pair.sender._coders.names == []
    connected(pair, 1e3)
    [session] = pair.sender._sessions.values()
    assert session.codecs == []
    await pair.receiver.close()


@pytest.mark.parametrize("codec", ["int8", "no such codec"])
async def test_a_part_in_a_codec_that_was_not_agreed_on_ends_the_session_by_name(
    make_pair: Any, codec: str
) -> None:
    pair = make_pair()
    pair.p.pool.release(pair.begin(KEY, 10))
    pair.pump()
    [handoff] = pair.receiver._handoffs.values()
    window = handoff.session.window
    pushed = Pushed(num_blocks=1, num_layers=4, staged=Staged(offset=window.offset, length=8, codec=codec))
    pair.receiver._on_pushed(handoff.session, handoff, pushed)
    pair.pump()
    assert error_codes(pair.received()) == ["transfer"]
    assert f"Pushed.staged.codec is {codec!r}" in pair.received()[0].error.message
    assert idle(pair)


async def test_a_payload_that_its_codec_cannot_read_is_never_served(make_pair: Any) -> None:
    pair = make_pair(num_blocks=64, codecs=("int8",), digest=False)
    connected(pair, 1e4)
    pair.data.held.add(("p-1", "d-1"))
    send_values(pair, 130)
    pair.pump()
    pair.p.staging[:8] ^= 0xFF
    pair.data.held.clear()
    pair.pump()
    assert error_codes(pair.received()) == ["digest_mismatch"]
    assert nothing_is_staged(pair)


async def test_where_computing_is_quicker_than_the_link_nothing_is_sent(make_pair: Any) -> None:
    pair = make_pair(num_blocks=64)
    connected(pair, 1e4)
    pair.sender._coders.prefill.add(1000.0, 0.1)
    before = wire_bytes(pair)
    send(pair, num_tokens=100)
    pair.pump()
    [ready] = pair.received()
    assert (ready.num_tokens, ready.cached_tokens, ready.num_bytes, ready.token_id) == (0, 0, 0, 42)
    assert len(ready.block_ids) == 25
    assert wire_bytes(pair) == before
    assert idle(pair)
    pair.d.pool.release(ready.block_ids)
    pair.d.events.clear()
    [session] = pair.sender._sessions.values()
    session.estimate = Measured(1e12)
    send(pair, OTHER, num_tokens=100)
    pair.pump()
    [ready] = pair.received()
    assert ready.num_tokens == 100


async def test_what_waits_for_the_link_counts(make_pair: Any) -> None:
    pair = make_pair(num_blocks=64)
    connected(pair, 1e6)
    pair.sender._coders.prefill.add(1000.0, 1.0)
    pair.data.held.add(("p-1", "d-1"))
    send(pair, FIRST._replace(attempt=1), num_tokens=100)  # 6.4 ms of the link, and 100 ms to compute
    pair.pump()
    [session] = pair.sender._sessions.values()
    assert session.backlog_bytes == 100 * pair.layout.token_bytes
    session.backlog_bytes += 200_000  # another 200 ms
    send(pair, OTHER, num_tokens=100)
    pair.pump()
    session.backlog_bytes -= 200_000
    pair.data.held.clear()
    pair.pump()
    tokens = {event.key: event.num_tokens for event in pair.received()}
    assert tokens == {FIRST._replace(attempt=1): 100, OTHER: 0}
    assert session.backlog_bytes == 0


async def test_recomputing_can_be_forbidden(make_pair: Any) -> None:
    pair = make_pair(num_blocks=64, recompute=False)
    connected(pair, 1e4)
    pair.sender._coders.prefill.add(1000.0, 0.1)
    send(pair, num_tokens=100)
    pair.pump()
    [ready] = pair.received()
    assert ready.num_tokens == 100
