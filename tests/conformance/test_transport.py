"""What every transport promises (kv_transfer/base.py), asked of each of them."""

from __future__ import annotations

import json
import time
import weakref
from typing import Any

import numpy as np
import pytest
from diphase.kv_transfer.base import (
    MAX_TAG_BYTES,
    DeviceMemory,
    Done,
    Failed,
    Fenced,
    Notified,
    PeerDown,
    Region,
)
from diphase.proto.errors import TransferError

from .transport_ends import NAMES, PATIENCE_S, SIZE, joined


@pytest.mark.parametrize("name", NAMES)
class TestWrites:
    def test_done_means_that_the_bytes_are_there_and_the_tag_follows_them(self, make: Any, name: str) -> None:
        a, b = joined(make, name)
        a.bytes[:1000] = np.arange(1000) % 251
        transfer = a.write("b", [(0, 5000, 600), (600, 100, 400)], b"tag")
        b.until(lambda: b.tags() == [b"tag"], a)
        np.testing.assert_array_equal(b.bytes[5000:5600], a.bytes[:600])
        np.testing.assert_array_equal(b.bytes[100:500], a.bytes[600:1000])
        a.until(lambda: a.terminals() == [Done(transfer)])
        assert not b.bytes[:100].any()
        assert b.of(Notified) == [Notified("a", b"tag")]

    def test_writes_and_notices_to_a_peer_arrive_in_the_order_of_the_calls(
        self, make: Any, name: str
    ) -> None:
        a, b = joined(make, name)
        wanted = []
        for i in range(60):
            if i % 3 == 2:
                a.transport.notify("b", b"n%d" % i)
            else:
                a.write("b", [(0, 0, 1 << (i % 20))], b"w%d" % i)
            wanted.append((b"n%d" if i % 3 == 2 else b"w%d") % i)
        b.until(lambda: len(b.tags()) == 60, a)
        assert b.tags() == wanted

    def test_a_transport_keeps_nothing_of_what_is_done(self, make: Any, name: str) -> None:
        """Deadlines are long and transfers are short."""
        a, b = joined(make, name)
        segments = np.array([[0, 0, 0, 0, 100]], dtype=np.int64)
        transfer = a.transport.write("b", segments, b"tag", 3600.0)
        kept = weakref.ref(segments)
        del segments
        a.until(lambda: a.terminals() == [Done(transfer)], b)
        a.until(lambda: kept() is None, b)

    def test_nothing_to_copy_is_done_too(self, make: Any, name: str) -> None:
        a, b = joined(make, name)
        first = a.write("b", [], b"none")
        second = a.write("b", [(0, 0, 0), (SIZE, SIZE, 0)], b"zero bytes")
        a.until(lambda: len(a.terminals()) == 2, b)
        assert a.terminals() == [Done(first), Done(second)]
        b.until(lambda: b.tags() == [b"none", b"zero bytes"])

    def test_an_empty_tag_is_not_delivered(self, make: Any, name: str) -> None:
        a, b = joined(make, name)
        a.write("b", [(0, 0, 10)])
        a.transport.notify("b", b"end")
        b.until(lambda: b"end" in b.tags(), a)
        assert b.tags() == [b"end"]

    def test_ten_thousand_segments_land_where_they_belong(self, make: Any, name: str) -> None:
        a, b = joined(make, name)
        rng = np.random.default_rng(1)
        a.bytes[:] = rng.integers(0, 256, SIZE, dtype=np.uint8)
        sources, targets = rng.permutation(10_000) * 100, rng.permutation(10_000) * 100
        a.write("b", [(int(s), int(t), 99) for s, t in zip(sources, targets, strict=True)], b"all")
        b.until(lambda: b.tags() == [b"all"], a)
        wanted = np.zeros(SIZE, dtype=np.uint8)
        for source, target in zip(sources, targets, strict=True):
            wanted[target : target + 99] = a.bytes[source : source + 99]
        np.testing.assert_array_equal(b.bytes, wanted)

    def test_both_directions_at_once(self, make: Any, name: str) -> None:
        a, b = joined(make, name)
        a.transport.admit("b")
        b.transport.connect(a.transport.endpoint(), 5.0)
        half = SIZE // 2
        a.bytes[:half], b.bytes[:half] = 3, 4
        for i in range(40):
            a.write("b", [(0, half, half)], b"from a %d" % i)
            b.write("a", [(0, half, half)], b"from b %d" % i)
        a.until(lambda: len(a.tags()) == 40 and len(a.terminals()) == 40, b)
        b.until(lambda: len(b.tags()) == 40 and len(b.terminals()) == 40, a)
        assert (a.bytes[half:] == 4).all()
        assert (b.bytes[half:] == 3).all()

    def test_every_transfer_ends_exactly_once_however_it_is_cancelled(self, make: Any, name: str) -> None:
        a, b = joined(make, name)
        rng = np.random.default_rng(2)
        transfers = []
        for i in range(300):
            transfers.append(a.write("b", [(0, 0, int(rng.integers(0, 20_000)))], b"%d" % i))
            if rng.random() < 0.5:
                a.transport.cancel(int(rng.choice(transfers)))
            a.poll()
        a.until(lambda: len(a.terminals()) >= 300, b)
        assert sorted(event.transfer_id for event in a.terminals()) == transfers
        assert {event.code for event in a.of(Failed)} <= {"cancelled"}
        b.until(lambda: len(b.tags()) >= len(a.of(Done)))
        assert len(set(b.tags())) == len(b.tags())

    def test_a_tag_that_comes_speaks_of_bytes_that_are_there_whatever_is_cancelled_around_it(
        self, make: Any, name: str
    ) -> None:
        count, each = 120, 200_000
        a, b = joined(make, name, size=count * each)
        rng = np.random.default_rng(3)
        a.bytes[:] = rng.integers(1, 256, len(a.bytes), dtype=np.uint8)
        checked = 0
        for i in range(count):
            cuts = np.sort(rng.integers(0, each, 3)).tolist()
            places = zip([0, *cuts], [*cuts, each], strict=True)
            a.write("b", [(i * each + j, i * each + j, k - j) for j, k in places], b"%d" % i)
            if rng.random() < 0.6:
                a.transport.cancel(int(rng.integers(max(1, i - 5), i + 2)))
            b.poll()
            for tag in b.tags()[checked:]:
                place = slice(int(tag) * each, (int(tag) + 1) * each)
                np.testing.assert_array_equal(b.bytes[place], a.bytes[place])
                checked += 1
        a.until(lambda: len(a.terminals()) == count, b)
        done = {b"%d" % (event.transfer_id - 1) for event in a.of(Done)}
        assert done <= set(b.tags())
        for tag in b.tags()[checked:]:
            place = slice(int(tag) * each, (int(tag) + 1) * each)
            np.testing.assert_array_equal(b.bytes[place], a.bytes[place])
        assert b.tags() == sorted(b.tags(), key=int)

    def test_who_does_not_poll_holds_the_writer_up_and_loses_nothing(self, make: Any, name: str) -> None:
        a, b = joined(make, name)
        accepted = 0
        limit = time.monotonic() + PATIENCE_S
        while accepted < 20_000 and time.monotonic() < limit:
            try:
                a.write("b", [(0, 0, 8)], b"%d" % accepted, s=60.0)
                accepted += 1
            except TransferError:
                a.woken.clear()
                a.poll()
                if len(a.of(Done)) >= 4096:
                    break
                a.woken.wait(0.05)
        assert accepted < 20_000
        b.until(lambda: len(b.tags()) >= accepted, a)
        assert b.tags() == [b"%d" % i for i in range(accepted)]
        a.until(lambda: len(a.of(Done)) == accepted)


@pytest.mark.parametrize("name", NAMES)
class TestRefusals:
    @pytest.mark.parametrize(
        "segment",
        [
            (0, 0, SIZE + 1),
            (SIZE, 0, 1),
            (0, SIZE - 5, 6),
            (-1, 0, 1),
            (0, -1, 1),
            (0, 0, -1),
            (2**63 - 1, 0, 1),
            (0, 2**63 - 8, 16),
        ],
    )
    def test_a_segment_out_of_bounds_is_refused(self, make: Any, name: str, segment: Any) -> None:
        a, b = joined(make, name)
        with pytest.raises(TransferError, match="segment"):
            a.write("b", [(0, 0, 1), segment])
        a.write("b", [(0, 0, 1)], b"still works")
        b.until(lambda: b.tags() == [b"still works"], a)

    def test_an_unknown_region_or_a_wrong_table_is_refused(self, make: Any, name: str) -> None:
        a, _ = joined(make, name)
        bad: Any
        for bad in (
            np.array([[1, 0, 0, 0, 1]]),
            np.array([[0, 0, 1, 0, 1]]),
            np.array([[0, 0, -1, 0, 1]]),
            np.zeros((1, 4), dtype=np.int64),
            np.zeros((1, 5), dtype=np.int32),
        ):
            with pytest.raises(TransferError, match="segment"):
                a.transport.write("b", bad, b"", 1.0)

    def test_segments_that_overlap_at_the_destination_are_refused(self, make: Any, name: str) -> None:
        a, b = joined(make, name)
        for segments, which in (
            ([(0, 0, 10), (20, 9, 10)], "segments 0 and 1"),
            ([(0, 500, 10), (20, 0, 5), (40, 505, 100)], "segments 0 and 2"),
            ([(0, 7, 1), (20, 100, 5), (40, 0, 100)], "segments 0 and 2"),
        ):
            with pytest.raises(TransferError, match=which):
                a.write("b", segments, b"overlap")
        a.write("b", [(0, 10, 10), (0, 20, 10), (5, 0, 10), (0, 15, 0)], b"side by side")
        b.until(lambda: b.tags() == [b"side by side"], a)

    def test_a_tag_that_is_too_long_is_refused_with_its_length(self, make: Any, name: str) -> None:
        a, b = joined(make, name)
        long = bytes(MAX_TAG_BYTES + 1)
        with pytest.raises(TransferError, match=r"a tag of 49 bytes.*48"):
            a.write("b", [(0, 0, 1)], long)
        with pytest.raises(TransferError, match=r"a tag of 49 bytes.*48"):
            a.transport.notify("b", long)
        a.write("b", [(0, 0, 1)], long[1:])
        b.until(lambda: b.tags() == [long[1:]], a)

    def test_memory_of_a_device_is_refused_where_it_cannot_be_moved(self, make: Any, name: str) -> None:
        a = make(name, "a")
        if a.transport.capabilities.device_memory:
            pytest.skip(f"transport {name} moves memory of devices")
        pool = Region(buffer=None, device=DeviceMemory(device=1, pointer=1 << 40, num_bytes=1 << 30))
        assert pool.num_bytes == 1 << 30
        with pytest.raises(TransferError, match="memory of cuda:1"):
            a.transport.register(pool)

    def test_an_unknown_peer_is_refused(self, make: Any, name: str) -> None:
        a, _ = joined(make, name)
        with pytest.raises(TransferError, match="no peer c"):
            a.write("c", [(0, 0, 1)])
        with pytest.raises(TransferError, match="no peer c"):
            a.transport.notify("c", b"x")

    @pytest.mark.parametrize("change", ["cut", "version", "transport", "field", "list", "empty"])
    def test_a_malformed_or_foreign_endpoint_is_refused(self, make: Any, name: str, change: str) -> None:
        a, b = make(name, "a"), make(name, "b")
        endpoint = b.transport.endpoint()
        fields = json.loads(endpoint)
        bad = {
            "cut": endpoint[:-3],
            "version": json.dumps({**fields, "version": 99}).encode(),
            "transport": json.dumps({**fields, "transport": "pigeon"}).encode(),
            "field": json.dumps({k: v for k, v in fields.items() if k != "incarnation"}).encode(),
            "list": b"[1]",
            "empty": b"",
        }[change]
        with pytest.raises(TransferError):
            a.transport.connect(bad, 1.0)
        assert a.transport.reaches(bad)
        assert a.transport.reaches(endpoint) is None

    def test_a_peer_that_does_not_admit_us_is_down(self, make: Any, name: str) -> None:
        a, b = make(name, "a"), make(name, "b")
        a.transport.connect(b.transport.endpoint(), 5.0)
        transfer = a.write("b", [(0, 0, 10)], b"unwelcome")
        a.until(lambda: bool(a.of(PeerDown)) and bool(a.of(Failed)), b)
        assert [(f.transfer_id, f.code) for f in a.of(Failed)] == [(transfer, "peer_lost")]
        assert b.events == []


@pytest.mark.parametrize("name", NAMES)
class TestEnds:
    def test_connect_twice_is_connect_once(self, make: Any, name: str) -> None:
        a, b = joined(make, name)
        assert a.transport.connect(b.transport.endpoint(), 5.0) == "b"
        a.write("b", [(0, 0, 10)], b"x")
        b.until(lambda: b.tags() == [b"x"], a)
        assert a.of(PeerDown) == b.of(PeerDown) == []

    @pytest.mark.parametrize("who", ["writer", "destination"])
    def test_after_disconnect_both_ends_are_told_once(self, make: Any, name: str, who: str) -> None:
        a, b = joined(make, name)
        a.write("b", [(0, 0, 10)], b"x")
        b.until(lambda: b.tags() == [b"x"], a)
        (a if who == "writer" else b).transport.disconnect("b" if who == "writer" else "a")
        a.until(lambda: bool(a.of(PeerDown)), b)
        b.until(lambda: bool(b.of(PeerDown)), a)
        assert [event.peer for event in a.of(PeerDown)] == ["b"]
        assert [event.peer for event in b.of(PeerDown)] == ["a"]
        with pytest.raises(TransferError, match="no peer b"):
            a.write("b", [(0, 0, 1)])

    def test_close_fails_what_is_in_flight_and_tells_the_peer(self, make: Any, name: str) -> None:
        a, b = joined(make, name)
        a.write("b", [(0, 0, 10)], b"x")
        b.until(lambda: b.tags() == [b"x"], a)
        seen = len(a.terminals())
        later = {a.write("b", [(0, 0, SIZE)]) for _ in range(4)}  # whoever is quick may finish one
        b.transport.close()
        a.until(lambda: bool(a.of(PeerDown)) and len(a.terminals()) >= seen + len(later))
        assert later <= {event.transfer_id for event in a.terminals()}
        assert [event.peer for event in a.of(PeerDown)] == ["b"]
        b.transport.close()

    def test_a_new_incarnation_takes_the_place_of_the_old(self, make: Any, name: str) -> None:
        a, b = joined(make, name)
        b.transport.close()
        a.until(lambda: [event.peer for event in a.of(PeerDown)] == ["b"])
        again = make(name, "b2")
        again.transport.admit("a")
        assert a.transport.connect(again.transport.endpoint(), 5.0) == "b2"
        a.bytes[:10] = 7
        a.write("b2", [(0, 0, 10)], b"hello")
        again.until(lambda: again.tags() == [b"hello"], a)
        assert (again.bytes[:10] == 7).all()
        assert not b.bytes.any()

    def test_fences_are_answered_in_order_also_by_nobody(self, make: Any, name: str) -> None:
        a, b = joined(make, name)
        a.write("b", [(0, 0, 10)], b"x")
        b.until(lambda: b.tags() == [b"x"], a)
        b.transport.fence("a", 5.0)
        b.transport.fence("stranger", 5.0)
        a.transport.fence("b", 5.0)
        b.until(lambda: len(b.of(Fenced)) == 2, a)
        a.until(lambda: a.of(Fenced) == [Fenced("b", True)], b)
        assert set(b.of(Fenced)) == {Fenced("a", True), Fenced("stranger", True)}

    def test_after_cancel_and_fence_nothing_is_written_late(self, make: Any, name: str) -> None:
        size = 24 << 20
        a, b = joined(make, name, size=size)
        marker = size - 8
        a.write("b", [(marker, marker, 8)], b"warm")
        b.until(lambda: b.tags() == [b"warm"], a)
        a.bytes[:marker] = 1
        transfers = [a.write("b", [(0, 0, marker)], b"late") for _ in range(3)]
        for transfer in transfers:
            a.transport.cancel(transfer)
        a.until(lambda: len(a.terminals()) == 4)
        a.transport.fence("b", 5.0)
        b.transport.fence("a", 5.0)
        a.until(lambda: a.of(Fenced) == [Fenced("b", True)], b)
        b.until(lambda: b.of(Fenced) == [Fenced("a", True)], a)
        before = b.bytes[:marker].copy()
        a.bytes[:marker] = 2
        a.write("b", [(marker, marker, 8)], b"end")
        b.until(lambda: b"end" in b.tags(), a)
        np.testing.assert_array_equal(b.bytes[:marker], before)
        cancelled = {event.transfer_id for event in a.of(Failed)}
        assert b.tags().count(b"late") <= len(transfers) - len(cancelled) + len(
            cancelled & set(transfers[:1])
        )
