"""What goes wrong between prefill and decode processes, as moves that a scenario's budget allows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from diphase.kv_transfer import machine as k

from .handoff_drivers import Move
from .handoff_parts import BLOCK_SIZE, ENDED, FAILED, GONE, Violation, Write
from .handoff_world import World

AGE_S = 0.1
LONG_S = 100.0
"""Longer than any deadline."""


class FaultyWorld(World):
    """See the module's paragraph. `faults` pays for what it yields out of the budget."""

    def faults(self) -> Iterator[Move]:
        if self.budget.get("stray"):
            for move in self.stray_moves():
                yield ("pay", "stray", move)
        if not self.budget.get("total", 1):
            return
        for kind, possible in (
            ("crash", self._crashes),
            ("message", self._message_faults),
            ("write", self._write_faults),
            ("fence", self._fence_faults),
            ("late", self._late_ticks),
            ("early", self._early_ticks),
            ("age", self._ageing),
            ("owner", self._owner_faults),
            ("grant", self._wrong_grants),
            ("part", self._wrong_parts),
            ("count", self._wrong_counts),
            ("twice", self._double_pushes),
        ):
            if self.budget.get(kind):
                for move in possible():
                    yield ("pay", kind, move)

    def pay(self, kind: str, move: Move) -> None:
        self.budget[kind] -= 1
        if "total" in self.budget and kind != "stray":
            self.budget["total"] -= 1
        getattr(self, move[0])(*move[1:])

    def _crashes(self) -> Iterator[Move]:
        for at, process in enumerate(self.processes):
            if process.alive:
                yield ("crash", at)

    def _message_faults(self) -> Iterator[Move]:
        for number, session in enumerate(self.sessions):
            if not session.cut:
                yield ("cut", number)
            for side in ("p", "d"):
                if getattr(session, f"to_{side}"):
                    yield ("lose", number, side)
                    yield (f"deliver_{side}", number, True)
        for index, t in enumerate(self.transfers):
            for notice in t.notices:
                yield ("lose_notice", index, notice)
                yield ("notice", index, notice, True)

    def _write_faults(self) -> Iterator[Move]:
        for index, t in enumerate(self.transfers):
            for write in t.writes:
                if write.live:
                    yield ("break_write", index, write.push.part)
                if write.live and write.lands:
                    yield ("land", index, write.push.part, False)

    def _fence_faults(self) -> Iterator[Move]:
        for number, session in enumerate(self.sessions):
            for side in ("p", "d"):
                if getattr(session, f"{side}_fences"):
                    yield (f"fence_{side}", number, False)

    def _late_ticks(self) -> Iterator[Move]:
        for index, t in enumerate(self.transfers):
            for side in ("p", "d"):
                seat = getattr(t, side)
                if seat is not None and seat.due < math.inf:
                    yield ("late", index, side, max(0.0, seat.due))
                    yield ("late", index, side, LONG_S)

    def _early_ticks(self) -> Iterator[Move]:
        """A Tick may wait behind an event that moves the deadline."""
        for index, t in enumerate(self.transfers):
            for side in ("p", "d"):
                seat = getattr(t, side)
                if seat is not None and seat.state != "over" and seat.due > 0.0:
                    yield ("say", index, side, k.Tick())

    def _ageing(self) -> Iterator[Move]:
        """A little time passes for one machine; no deadline ends."""
        for index, t in enumerate(self.transfers):
            for side in ("p", "d"):
                seat = getattr(t, side)
                if seat is not None and seat.state != "over" and seat.due > AGE_S:
                    yield ("age", index, side)

    def _owner_faults(self) -> Iterator[Move]:
        for number, request in enumerate(self.requests):
            if request.transfer >= 0 and not request.outcome:
                yield ("client_goes", number)
        for index, t in enumerate(self.transfers):
            if t.p is not None and t.p_blocks:
                yield ("engine_fails", index)
                yield ("seed", index) if t.computed < self.scenario.steps else ("no_need", index)

    # A peer or a digest worker that errs in what it says.

    def _wrong_grants(self) -> Iterator[Move]:
        for index, t in enumerate(self.transfers):
            if t.p is not None and t.p.state in ("reserving", "held") and t.d_holds == "granted":
                blocks = self.scenario.requests[t.request]
                for first, count in ((0, 0), (0, 1 + blocks), (1 + blocks, 0), (blocks - 1, blocks)):
                    yield ("say", index, "p", k.PeerGranted(first, count))

    def _wrong_parts(self) -> Iterator[Move]:
        """They name what was not granted, or are not here and have a digest."""
        for index, t in enumerate(self.transfers):
            if t.d is not None and t.d_holds == "granted":
                blocks, layers = t.d.machine.num_blocks, self.scenario.layers
                for names in (
                    (0, blocks + 1, 0, layers),
                    (0, 0, 0, layers),
                    (-1, 1, 0, layers),
                    (0, 1, 0, layers + 1),
                    (0, 1, 0, 0),
                    (0, 1, -1, 1),
                ):
                    yield ("say", index, "d", k.PartArrived(7, *names))
                yield ("say", index, "d", k.PartChecked(7, True))

    def _wrong_counts(self) -> Iterator[Move]:
        for index, t in enumerate(self.transfers):
            if t.d is not None and t.d.state in ("reserved", "filling"):
                for count in range(3):
                    yield ("say", index, "d", k.PeerCompleted(count))

    def _double_pushes(self) -> Iterator[Move]:
        for index, t in enumerate(self.transfers):
            if t.p is not None and t.p.state == "sending" and any(w.live and w.lands for w in t.writes):
                yield ("push_twice", index)

    # What happens then.

    def crash(self, at: int) -> None:
        """kill -9. The router loses the worker, the other side its link."""
        role = self.processes[at].role
        self.processes[at].alive, self.processes[at].waiting = False, ()
        for number, session in enumerate(self.sessions):
            if getattr(session, f"{role}_at") == at and role not in session.lost:
                session.lost += role
                session.cut, session.to_p, session.to_d = True, (), ()
                setattr(session, f"{role}_side", "gone")
                setattr(session, f"{role}_fences", ())
                for index, t in enumerate(self.transfers):
                    if t.session == number:
                        self._die(t, role)
                        self.reports += ((index, f"lost {role}"),)

    def _die(self, t: Any, role: str) -> None:
        if role == "p":
            t.p, t.p_blocks, t.p_held, t.endings = None, (), (), ()
            self.touch(t, None, live=False, reads=False)
        else:
            t.d, t.d_blocks, t.d_cached, t.d_holds, t.notices, t.checks = None, (), (), "none", (), ()
            self.touch(t, None, lands=False)

    def cut(self, number: int) -> None:
        """The link breaks; each side will see it."""
        session = self.sessions[number]
        session.cut, session.to_p, session.to_d = True, (), ()

    def lose(self, number: int, side: str) -> None:
        session = self.sessions[number]
        setattr(session, f"to_{side}", getattr(session, f"to_{side}")[1:])

    def lose_notice(self, index: int, event: k.PartArrived) -> None:
        t = self.transfers[index]
        t.notices = tuple(n for n in t.notices if n != event)

    def break_write(self, index: int, part: int) -> None:
        t = self.transfers[index]
        [write] = [w for w in t.writes if w.push.part == part]
        self.fail_write(t, write, FAILED)

    def late(self, index: int, side: str, seconds: float) -> None:
        """So much time passes on this machine's clock before anything else happens to it."""
        t = self.transfers[index]
        setattr(t, side, getattr(t, side).later(seconds))
        self.tick(index, side)

    def age(self, index: int, side: str) -> None:
        t = self.transfers[index]
        setattr(t, side, getattr(t, side).later(AGE_S))

    def tick(self, index: int, side: str) -> None:
        before = getattr(self.transfers[index], side)
        (self.step_p if side == "p" else self.step_d)(index, k.Tick())
        after = getattr(self.transfers[index], side)
        if after is before or after.due <= 0.0:
            raise Violation(f"{side} ticks for ever in {before.state}")

    def client_goes(self, number: int) -> None:
        request = self.requests[number]
        self.cancel_both(request.transfer)
        request.outcome = "cancelled"

    def engine_fails(self, index: int) -> None:
        self.reports += ((index, "failed"),)
        self.end_p(index, FAILED)

    def no_need(self, index: int) -> None:
        """The first token ends the request: no KV moves."""
        self.reports += ((index, "done"),)
        self.end_p(index, ENDED)

    def say(self, index: int, to: str, event: k.Event) -> None:
        """The other side says this, whatever it does."""
        (self.step_p if to == "p" else self.step_d)(index, event)

    def push_twice(self, index: int) -> None:
        """The writer pushes the same blocks again, as a part of its own."""
        t = self.transfers[index]
        m = t.p.machine
        push = replace(t.writes[0].push, part=m.num_parts)
        t.p = self._seat("p", replace(m, num_parts=m.num_parts + 1, live=m.live | {m.num_parts}))
        t.writes = (*t.writes, Write(push, live=True, reads=True, lands=True))

    # Events out of nowhere, only where the table that is on trial says that nothing happens.

    def stray_moves(self) -> Iterator[Move]:
        for side, state, kind in self.scenario.strays:
            for index, t in enumerate(self.transfers):
                seat = getattr(t, side)
                if seat is not None and seat.state == state:
                    for event in self.samples(t, kind):
                        yield ("say", index, side, event)

    def samples(self, t: Any, kind: type) -> Iterator[k.Event]:
        """Events of a kind as they could come at this moment."""
        blocks = self.scenario.requests[t.request]
        whole = (0, blocks, 0, self.scenario.layers)
        found: dict[type, tuple[k.Event, ...]] = {
            k.Computed: (k.Computed(blocks * BLOCK_SIZE - 1, 0, self.scenario.layers),),
            k.Ended: (k.Ended(FAILED),),
            k.PeerGranted: (k.PeerGranted(0, blocks),),
            k.PeerQueued: (k.PeerQueued(30.0),),
            k.PeerRefused: (k.PeerRefused(FAILED),),
            k.PeerProgressed: (k.PeerProgressed(0),),
            k.PeerCompleted: (k.PeerCompleted(0), k.PeerCompleted(1)),
            k.PeerAborted: (k.PeerAborted(FAILED),),
            k.WriteEnded: tuple(k.WriteEnded(part, fault) for part in (0, 7) for fault in (None, FAILED)),
            k.PartArrived: tuple(k.PartArrived(part, *whole) for part in (0, 1)),
            k.PartChecked: (k.PartChecked(0, True), k.PartChecked(0, False)),
            k.FenceEnded: (k.FenceEnded(True), k.FenceEnded(False)),
            k.LinkLost: (k.LinkLost(GONE),),
            k.PeerGone: (k.PeerGone(GONE),),
            k.RoomFound: (k.RoomFound(0), k.RoomFound(1)),
        }
        yield from found.get(kind, ())
        if kind in (k.Seeded, k.PeerReserved, k.PeerVerified, k.Tick):
            yield kind()
