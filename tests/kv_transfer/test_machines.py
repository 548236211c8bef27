"""Both machines, cell by cell: every pair of state and event does what its table says."""

from __future__ import annotations

import math
from typing import Any

import pytest
from diphase.kv_transfer import machine as k
from diphase.kv_transfer.decode_side import (
    DECODE_EVENTS,
    DECODE_TABLE,
    Decode,
    DecodeState,
    start_decode,
    step_decode,
)
from diphase.kv_transfer.prefill_side import (
    PREFILL_EVENTS,
    PREFILL_TABLE,
    Prefill,
    PrefillState,
    start_prefill,
    step_prefill,
)

TIMING = k.Timing(reserve_timeout_s=5.0, lease_s=30.0, progress_timeout_s=2.0, tail_timeout_s=10.0)
FAULT = k.Fault("transfer", "broken")
NO_NEED = k.Fault(k.CANCELLED, "not needed")


def prefill(**changes: Any) -> Prefill:
    """10 tokens in blocks of 4, of 4 layers."""
    values: dict[str, Any] = {
        "num_tokens": 10,
        "block_size": 4,
        "num_layers": 4,
        "layerwise": False,
        "max_push_runs": 1000,
        "timing": TIMING,
        "now": 0.0,
    }
    return start_prefill(**{**values, **changes})


def decode(num_blocks: int = 3) -> Decode:
    return start_decode(num_blocks=num_blocks, num_layers=4, timing=TIMING, now=0.0)


def play(machine: Any, *events: k.Event, now: float = 1.0) -> tuple[Any, list[k.Action]]:
    """The machine after these events, and all actions."""
    step = step_prefill if isinstance(machine, Prefill) else step_decode
    actions: list[k.Action] = []
    for event in events:
        machine, new = step(machine, event, now)
        actions.extend(new)
    return machine, actions


ALL_COMPUTED = k.Computed(10, 0, 4)
GRANT = k.PeerGranted(0, 3)

PREFILL_PATHS: dict[PrefillState, list[list[k.Event]]] = {
    PrefillState.RESERVING: [[], [ALL_COMPUTED], [ALL_COMPUTED, k.Seeded()]],
    PrefillState.HELD: [[k.PeerQueued(30.0)], [ALL_COMPUTED, k.Seeded(), k.PeerQueued(30.0)]],
    PrefillState.SENDING: [[GRANT], [GRANT, k.Computed(4, 0, 4)]],
    PrefillState.SENT: [[GRANT, ALL_COMPUTED, k.Seeded()], [k.PeerGranted(3, 0), ALL_COMPUTED, k.Seeded()]],
    PrefillState.SETTLING: [[GRANT, ALL_COMPUTED, k.Ended(FAULT)]],
    PrefillState.FENCING: [[GRANT, ALL_COMPUTED, k.Ended(FAULT), k.WriteEnded(0, FAULT)]],
    PrefillState.OVER: [[k.Ended(FAULT)]],
}
PREFILL_SAMPLES: list[k.Event] = [
    k.Computed(8, 0, 4),
    k.Computed(10, 0, 2),
    ALL_COMPUTED,
    k.Seeded(),
    k.Ended(FAULT),
    k.Ended(NO_NEED),
    GRANT,
    k.PeerGranted(3, 0),
    k.PeerGranted(1, 3),
    k.PeerQueued(30.0),
    k.PeerRefused(FAULT),
    k.PeerVerified(),
    k.PeerAborted(FAULT),
    k.WriteEnded(0, None),
    k.WriteEnded(0, FAULT),
    k.WriteEnded(7, None),
    k.FenceEnded(True),
    k.FenceEnded(False),
    k.LinkLost(FAULT),
    k.PeerGone(FAULT),
    k.Tick(),
]
PART = k.PartArrived(0, 0, 3, 0, 4)
ROOM = k.RoomFound(0)
DECODE_PATHS: dict[DecodeState, list[list[k.Event]]] = {
    DecodeState.WAITING: [[], [k.Tick()]],
    DecodeState.RESERVED: [[ROOM], [k.RoomFound(3)]],
    DecodeState.FILLING: [[ROOM, k.PeerProgressed(4)], [ROOM, PART]],
    DecodeState.VERIFYING: [[ROOM, k.PeerCompleted(1)], [ROOM, PART, k.PeerCompleted(1)]],
    DecodeState.QUARANTINED: [[ROOM, k.Ended(FAULT)], [ROOM, k.LinkLost(FAULT)]],
    DecodeState.FENCING: [[ROOM, k.PeerAborted(FAULT)]],
    DecodeState.OVER: [[k.Ended(FAULT)], [k.RoomFound(3), k.PeerCompleted(0)]],
}
DECODE_SAMPLES: list[k.Event] = [
    ROOM,
    k.PeerReserved(),
    k.PeerProgressed(4),
    k.PeerCompleted(0),
    k.PeerCompleted(1),
    k.PeerAborted(FAULT),
    k.PeerAborted(NO_NEED),
    PART,
    k.PartArrived(5, 0, 1, 0, 4),
    k.PartArrived(0, 2, 2, 0, 4),
    k.PartArrived(0, 0, 1, 3, 2),
    k.PartChecked(0, True),
    k.PartChecked(0, False),
    k.Ended(FAULT),
    k.FenceEnded(True),
    k.FenceEnded(False),
    k.LinkLost(FAULT),
    k.PeerGone(FAULT),
    k.Tick(),
]


@pytest.mark.parametrize(
    ("table", "states", "events"),
    [(PREFILL_TABLE, PrefillState, PREFILL_EVENTS), (DECODE_TABLE, DecodeState, DECODE_EVENTS)],
)
def test_every_cell_is_filled_and_every_event_belongs_to_a_side(table: Any, states: Any, events: Any) -> None:
    assert set(table) == set(states)
    for row in table.values():
        assert tuple(row) == events
        for cell in row.values():
            assert callable(cell) or isinstance(cell, k.Refusal)
    sides = set(PREFILL_EVENTS) | set(DECODE_EVENTS)
    assert sides == set(k.Event.__args__)


@pytest.mark.parametrize(
    ("paths", "samples", "make"),
    [(PREFILL_PATHS, PREFILL_SAMPLES, prefill), (DECODE_PATHS, DECODE_SAMPLES, decode)],
)
class TestEveryCell:
    def test_paths_lead_where_they_say_and_samples_cover_every_event(
        self, paths: Any, samples: Any, make: Any
    ) -> None:
        for state, ways in paths.items():
            for way in ways:
                assert play(make(), *way)[0].state == state
        table = PREFILL_TABLE if make is prefill else DECODE_TABLE
        assert {type(event) for event in samples} == set(table[next(iter(paths))])

    def test_a_cell_steps_or_refuses_and_its_deadline_is_ahead(
        self, paths: Any, samples: Any, make: Any
    ) -> None:
        for state, ways in paths.items():
            for way in ways:
                for event in samples:
                    before, _ = play(make(), *way)
                    after, actions = play(before, event)
                    table = PREFILL_TABLE if make is prefill else DECODE_TABLE
                    cell = table[state][type(event)]
                    if isinstance(cell, k.Refusal):
                        assert after is before
                        assert actions == ([k.Refuse(cell.reason)] if cell.counted else [])
                    if isinstance(event, k.Tick):
                        assert after.due > 1.0, f"{state} would tick for ever"

    def test_an_overdue_tick_moves_the_deadline(self, paths: Any, samples: Any, make: Any) -> None:
        for ways in paths.values():
            for way in ways:
                machine, _ = play(make(), *way)
                if machine.due < math.inf:
                    after, _ = play(machine, k.Tick(), now=machine.due)
                    assert after.due > machine.due

    def test_over_is_over(self, paths: Any, samples: Any, make: Any) -> None:
        quiet = (k.Refuse, k.SendAbort, k.CancelWrites)
        for way in paths["over"]:
            machine, _ = play(make(), *way)
            for event in samples:
                after, actions = play(machine, event)
                assert after.state == "over"
                assert all(isinstance(action, quiet) for action in actions)

    def test_the_peer_being_gone_ends_everything_at_once(self, paths: Any, samples: Any, make: Any) -> None:
        for state, ways in paths.items():
            for way in ways:
                machine, actions = play(play(make(), *way)[0], k.PeerGone(FAULT))
                assert machine.state == "over"
                had_blocks = make is prefill or state not in ("waiting", "over")
                if state != "over" and had_blocks:
                    assert any(isinstance(action, k.Release | k.Lift) for action in actions)


class TestPrefillSide:
    def test_a_short_prompt_goes_whole_when_it_is_computed(self) -> None:
        m, actions = play(prefill(), GRANT, k.Computed(10, 0, 2))
        assert [a for a in actions if isinstance(a, k.Push)] == []
        m, actions = play(m, k.Computed(10, 2, 2), k.Seeded())
        assert actions == [k.Push(0, 0, 3, 0, 4), k.SendComplete(1)]
        assert m.state is PrefillState.SENT

    def test_a_long_prompt_goes_chunk_of_layers_by_chunk_of_layers(self) -> None:
        _, actions = play(prefill(layerwise=True), GRANT, k.Computed(10, 0, 2), k.Computed(10, 2, 2))
        pushes = [a for a in actions if isinstance(a, k.Push)]
        assert pushes == [k.Push(0, 0, 3, 0, 2), k.Push(1, 0, 3, 2, 2)]

    def test_only_full_blocks_go_before_the_prompt_is_complete(self) -> None:
        _, actions = play(prefill(), GRANT, k.Computed(7, 0, 4), k.Computed(10, 0, 4))
        pushes = [a for a in actions if isinstance(a, k.Push)]
        assert pushes == [k.Push(0, 0, 1, 0, 4), k.Push(1, 1, 2, 0, 4)]

    def test_what_was_computed_before_the_grant_goes_with_it_except_what_decode_has(self) -> None:
        m, actions = play(prefill(), ALL_COMPUTED, k.Seeded(), k.PeerQueued(30.0), k.PeerGranted(1, 2))
        assert actions == [k.Push(0, 1, 2, 0, 4), k.SendComplete(1)]
        assert m.state is PrefillState.SENT

    def test_nothing_is_pushed_when_decode_has_every_block(self) -> None:
        _, actions = play(prefill(), ALL_COMPUTED, k.Seeded(), k.PeerGranted(3, 0))
        assert actions == [k.SendComplete(0)]

    def test_a_large_push_is_split_along_the_blocks(self) -> None:
        _, actions = play(prefill(num_tokens=20, max_push_runs=8), k.PeerGranted(0, 5), k.Computed(20, 0, 4))
        assert [a for a in actions if isinstance(a, k.Push)] == [
            k.Push(0, 0, 2, 0, 4),
            k.Push(1, 2, 2, 0, 4),
            k.Push(2, 4, 1, 0, 4),
        ]

    def test_writes_are_cancelled_before_the_abort_is_told(self) -> None:
        for event in (k.Ended(FAULT), k.PeerAborted(FAULT)):
            _, actions = play(play(prefill(), GRANT, ALL_COMPUTED)[0], event)
            kinds = [type(a) for a in actions]
            assert kinds.index(k.CancelWrites) < kinds.index(k.SendAbort)

    def test_blocks_go_only_when_writes_are_terminal_and_fenced(self) -> None:
        m, actions = play(prefill(), GRANT, ALL_COMPUTED, k.Ended(FAULT))
        assert k.Release() not in actions
        m, actions = play(m, k.WriteEnded(0, FAULT))
        assert actions == [k.StartFence()]
        _, actions = play(m, k.FenceEnded(True))
        assert actions == [k.Release()]

    def test_a_fence_that_does_not_hold_takes_the_connection_down(self) -> None:
        m, actions = play(prefill(), GRANT, ALL_COMPUTED, k.Ended(FAULT), k.WriteEnded(0, FAULT))
        m, actions = play(m, k.FenceEnded(False))
        assert actions == [k.Disconnect()]
        assert play(m, k.PeerGone(FAULT))[1] == [k.Release()]

    def test_verified_before_our_transport_knows_waits_for_it(self) -> None:
        m, actions = play(prefill(), GRANT, ALL_COMPUTED, k.Seeded(), k.PeerVerified())
        assert actions[-1] == k.Report(None)
        assert play(m, k.WriteEnded(0, None))[1] == [k.Release()]

    def test_a_seed_without_all_the_kv_is_a_failure(self) -> None:
        _, actions = play(prefill(), GRANT, k.Computed(8, 0, 4), k.Seeded())
        assert any(isinstance(a, k.Report) and a.fault and a.fault.code == "internal" for a in actions)

    @pytest.mark.parametrize("grant", [k.PeerGranted(0, 2), k.PeerGranted(1, 3), k.PeerGranted(4, 0)])
    def test_a_grant_of_another_size_is_a_failure(self, grant: k.PeerGranted) -> None:
        m, actions = play(prefill(), grant)
        assert m.state is PrefillState.OVER
        assert k.Release() in actions

    def test_leases_are_extended_by_news_and_end_without(self) -> None:
        m, _ = play(prefill(), k.PeerQueued(30.0))
        m, _ = play(m, k.PeerQueued(30.0), now=20.0)
        m, actions = play(m, k.Tick(), now=49.0)
        assert actions == []
        m, actions = play(m, k.Tick(), now=51.0)
        assert m.state is PrefillState.OVER

    def test_progress_is_told_while_the_prompt_computes(self) -> None:
        m, _ = play(prefill(), GRANT, now=0.0)
        m, actions = play(m, k.Tick(), now=0.5)
        assert actions == [k.SendProgress(0)]
        assert m.due == 1.0

    @pytest.mark.parametrize(
        ("events", "at"),
        [
            ([], 5.0),
            ([k.PeerQueued(30.0)], 30.0),
            ([GRANT, ALL_COMPUTED], 2.0),
            ([GRANT, ALL_COMPUTED, k.Seeded()], 2.0),
            ([GRANT, ALL_COMPUTED, k.Seeded(), k.WriteEnded(0, None)], 10.0),
        ],
    )
    def test_every_wait_ends(self, events: list[k.Event], at: float) -> None:
        m, _ = play(prefill(), *events, now=0.0)
        _, actions = play(m, k.Tick(), now=at - 0.01)
        assert not any(isinstance(a, k.Report) for a in actions)
        _, actions = play(m, k.Tick(), now=at)
        [report] = [a for a in actions if isinstance(a, k.Report)]
        assert report.fault is not None
        assert report.fault.code == "deadline_exceeded"


class TestDecodeSide:
    def test_ready_needs_complete_and_every_part_intact_in_any_order(self) -> None:
        parts = [k.PartArrived(0, 0, 2, 0, 4), k.PartArrived(1, 2, 1, 0, 4)]
        checks = [k.PartChecked(0, True), k.PartChecked(1, True)]
        orders: tuple[list[k.Event], ...] = (
            [*parts, *checks, k.PeerCompleted(2)],
            [k.PeerCompleted(2), *parts, *checks],
            [parts[1], k.PeerCompleted(2), checks[1], parts[0], checks[0]],
        )
        for events in orders:
            m, _ = play(decode(), ROOM, *events[:-1])
            assert m.state is not DecodeState.OVER
            m, actions = play(m, events[-1])
            assert actions == [k.SendVerified(), k.Report(None)]

    def test_a_damaged_part_is_never_served(self) -> None:
        m, actions = play(decode(), ROOM, PART, k.PeerCompleted(1), k.PartChecked(0, False))
        assert m.state is DecodeState.QUARANTINED
        [report] = [a for a in actions if isinstance(a, k.Report)]
        assert report.fault is not None
        assert report.fault.code == "digest_mismatch"

    @pytest.mark.parametrize(
        "parts",
        [
            [k.PartArrived(0, 0, 2, 0, 4)],
            [k.PartArrived(0, 0, 3, 0, 3)],
            [k.PartArrived(0, 0, 3, 0, 4), k.PartArrived(1, 0, 1, 0, 1)],
            [k.PartArrived(0, 0, 4, 0, 4)],
            [k.PartArrived(0, 0, 3, 1, 4)],
            [k.PartArrived(0, 0, 0, 0, 4)],
            [k.PartArrived(9, 0, 3, 0, 4)],
        ],
    )
    def test_parts_that_do_not_cover_the_prompt_exactly_are_a_failure(
        self, parts: list[k.PartArrived]
    ) -> None:
        checks = [k.PartChecked(part.part, True) for part in parts]
        m, actions = play(decode(), ROOM, *parts, *checks, k.PeerCompleted(len(parts)))
        assert m.state is DecodeState.QUARANTINED
        assert k.SendVerified() not in actions

    def test_blocks_that_were_cached_are_not_sent(self) -> None:
        m, _ = play(decode(), k.RoomFound(2), k.PartArrived(0, 2, 1, 0, 4), k.PartChecked(0, True))
        assert play(m, k.PeerCompleted(1))[0].state is DecodeState.OVER
        m, _ = play(decode(), k.RoomFound(2), PART)
        assert m.state is DecodeState.QUARANTINED

    def test_blocks_are_lifted_only_after_the_writer_cancelled_and_the_fence_holds(self) -> None:
        m, actions = play(decode(), ROOM, PART, k.Ended(FAULT))
        assert actions[-2:] == [k.Quarantine(), k.SendAbort(FAULT)]
        m, actions = play(m, k.PeerAborted(NO_NEED))
        assert actions == [k.StartFence()]
        m, actions = play(m, k.FenceEnded(False))
        assert actions == [k.StartFence()]
        assert play(m, k.FenceEnded(True))[1] == [k.Lift()]

    def test_an_unanswered_abort_is_sent_again(self) -> None:
        m, _ = play(decode(), ROOM, k.Ended(FAULT), now=0.0)
        m, actions = play(m, k.Tick(), now=1.0)
        assert actions == [k.SendAbort(FAULT)]
        assert m.due == 2.0

    def test_an_end_without_fault_is_not_reported(self) -> None:
        for path in ([], [ROOM], [ROOM, PART]):
            _, actions = play(decode(), *path, k.PeerAborted(NO_NEED))
            assert not any(isinstance(a, k.Report) for a in actions)
            _, actions = play(decode(), *path, k.PeerAborted(FAULT))
            assert k.Report(FAULT) in actions

    @pytest.mark.parametrize(
        ("events", "at"),
        [
            ([ROOM], 2.0),
            ([ROOM, k.PeerProgressed(4)], 2.0),
            ([ROOM, k.PeerCompleted(1)], 2.0),
        ],
    )
    def test_every_wait_ends(self, events: list[k.Event], at: float) -> None:
        m, _ = play(decode(), *events, now=0.0)
        assert play(m, k.Tick(), now=at - 0.01)[1] == []
        m, actions = play(m, k.Tick(), now=at)
        assert m.state is DecodeState.QUARANTINED
        assert any(isinstance(a, k.Report) for a in actions)

    def test_the_tail_ends_even_while_something_moves(self) -> None:
        m, _ = play(decode(12), ROOM, k.PeerCompleted(12), now=0.0)
        for part in range(6):
            m, _ = play(m, k.PartArrived(part, part, 1, 0, 4), now=1.9 * part)
        assert m.due == 10.0
        assert play(m, k.Tick(), now=10.0)[0].state is DecodeState.QUARANTINED

    def test_who_waits_for_room_says_so_in_time_for_the_lease(self) -> None:
        m, actions = play(decode(), k.Tick(), now=0.0)
        assert actions == [k.SendQueued()]
        assert m.due == 10.0
        assert play(m, k.Tick(), now=10.0)[1] == [k.SendQueued()]
