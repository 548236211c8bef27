"""What is remembered of hand-offs, and how much."""

from __future__ import annotations

from diphase.kv_transfer import machine as k
from diphase.kv_transfer.decode_side import DecodeState
from diphase.kv_transfer.handoff_traces import MAX_ENTRIES, MAX_HANDOFFS, TraceBook
from diphase.proto.ids import HandoffKey

KEY = HandoffKey("r", 0)


def shown(book: TraceBook, request_id: str = "r") -> list[tuple[str, str, float, float]]:
    return [(e.name, e.detail, e.begin_s, e.end_s) for e in book.events(request_id)]


def test_a_push_lasts_until_its_write_ended_and_ticks_are_left_out() -> None:
    book = TraceBook()
    book.note(KEY, 1.0, k.PeerGranted(0, 3))
    book.note(KEY, 1.5, k.Tick())
    book.note(KEY, 2.0, k.Push(0, 0, 2, 0, 4))
    book.note(KEY, 2.5, k.Push(1, 2, 1, 0, 4))
    book.note(KEY, 3.0, k.WriteEnded(1, None))
    book.note(KEY, 4.0, k.WriteEnded(0, k.Fault("transfer", "broken")))
    book.note(KEY, 5.0, k.StartFence())
    book.note(KEY, 6.0, k.FenceEnded(True))
    assert shown(book) == [
        ("peer granted", "first_block=0 num_blocks=3", 1.0, 1.0),
        ("push", "part=0 first_block=0 num_blocks=2 first_layer=0 num_layers=4 transfer: broken", 2.0, 4.0),
        ("push", "part=1 first_block=2 num_blocks=1 first_layer=0 num_layers=4", 2.5, 3.0),
        ("fence", "ok=True", 5.0, 6.0),
    ]


def test_attempts_are_told_apart_and_others_left_out() -> None:
    book = TraceBook()
    book.note(KEY, 1.0, k.Seeded())
    book.note(HandoffKey("r", 1), 2.0, k.Seeded())
    book.note(HandoffKey("s", 0), 3.0, k.Seeded())
    assert [event.track for event in book.events("r")] == ["hand-off, attempt 0", "hand-off, attempt 1"]
    assert book.events("nobody") == []


def test_states_have_a_track_of_their_own_and_last_until_the_next() -> None:
    book = TraceBook()
    for at, state in ((1.0, DecodeState.WAITING), (2.5, DecodeState.RESERVED), (3.0, DecodeState.OVER)):
        book.note(KEY, at, state)
        book.note(KEY, at, k.SendQueued())
    states = [event for event in book.events("r") if event.track == "hand-off, attempt 0: state"]
    assert [(event.name, event.begin_s, event.end_s) for event in states] == [
        ("waiting", 1.0, 2.5),
        ("reserved", 2.5, 3.0),
        ("over", 3.0, 3.0),
    ]


def test_memory_is_bounded_and_says_so() -> None:
    book = TraceBook()
    for i in range(MAX_ENTRIES + 10):
        book.note(KEY, float(i), k.SendQueued())
    events = shown(book)
    assert len(events) == MAX_ENTRIES + 1
    assert events[-1][0] == "more was not kept"
    book.note(KEY, 1e3, DecodeState.OVER)
    assert shown(book)[-2:] == [("over", "", 1e3, 1e3), ("more was not kept", "", 1e3, 1e3)]
    for i in range(MAX_HANDOFFS):
        book.note(HandoffKey(f"other{i}", 0), 0.0, k.Seeded())
    assert shown(book) == []
