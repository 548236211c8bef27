"""Everything that may happen between prefill and decode processes when nothing goes wrong, as moves.

Every machine has a clock of its own, and messages take any time: a deadline may pass before or after anything
else. What goes wrong is in handoff_faults.py, what must hold in handoff_invariants.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from diphase.kv_transfer import machine as k
from diphase.proto.errors import DiphaseError

from .handoff_drivers import Drivers, Move
from .handoff_parts import BLOCK_SIZE, ENDED, GONE, NOW_S, TIMING, Session, Transfer, Violation


class World(Drivers):
    """See the module's paragraph."""

    def make(self, move: Move) -> None:
        """Makes one move; then whoever waits for room gets it, as after every turn of the loop."""
        getattr(self, move[0])(*move[1:])
        for at, process in enumerate(self.processes):
            if process.waiting:
                self.give_room(at)
        self.tidy()

    def moves(self) -> Iterator[Move]:
        for at, process in enumerate(self.processes):
            if not process.alive:
                yield ("restart", at)
        for number, session in enumerate(self.sessions):
            yield from self._session_moves(number, session)
        for index, t in enumerate(self.transfers):
            yield from self._transfer_moves(index, t)
        for report in self.reports:
            yield ("hear", *report)
        for cancel in self.cancels:
            yield ("cancel", *cancel)
        yield from self.slow_moves()

    def slow_moves(self) -> Iterator[Move]:
        """What owners do when they like."""
        for number, request in enumerate(self.requests):
            if not request.outcome and request.transfer < 0:
                for p, d in self.live_pairs():
                    yield ("start", number, p, d)
                break  # names are given in the order of the starts: which is which does not matter
        for index, t in enumerate(self.transfers):
            if t.p is not None and t.p_blocks:
                yield ("seed", index) if t.computed == self.scenario.steps else ("compute", index)
            if t.d_holds == "ready":
                yield ("finish", index)

    def live_pairs(self) -> Iterator[tuple[int, int]]:
        for p, one in enumerate(self.processes):
            for d, other in enumerate(self.processes):
                if one.role == "p" and other.role == "d" and one.alive and other.alive:
                    yield p, d

    def _session_moves(self, number: int, session: Any) -> Iterator[Move]:
        if session.to_p:
            yield ("deliver_p", number)
        if session.to_d:
            yield ("deliver_d", number)
        for side in ("p", "d"):
            if session.cut and getattr(session, f"{side}_side") == "up":
                yield ("take_down", number, side)
            if getattr(session, f"{side}_side") == "closing":
                yield ("bury", number, side)
        if session.p_fences:
            yield ("fence_p", number, True)
        if session.d_fences:
            yield ("fence_d", number, True)

    def _transfer_moves(self, index: int, t: Any) -> Iterator[Move]:
        for write in t.writes:
            if write.live and write.lands:
                yield ("land", index, write.push.part)
        if t.endings:
            yield ("end_write", index)
        for notice in t.notices:
            yield ("notice", index, notice)
        for part in t.checks:
            yield ("digest", index, part)

    def deliver_p(self, number: int, keep: bool = False) -> None:
        session = self.sessions[number]
        index, event = session.to_p[0]
        session.to_p = session.to_p if keep else session.to_p[1:]
        t = self.transfers[index]
        if t.p is not None and t.p.state != "over":
            if self.scenario.recompute and isinstance(event, k.PeerGranted):
                event = k.PeerGranted(t.p.machine.num_blocks, 0)
            self.step_p(index, event)
        elif isinstance(event, k.PeerAborted | k.PeerGranted):
            self.send(session, "d", index, k.PeerAborted(ENDED))

    def deliver_d(self, number: int, keep: bool = False) -> None:
        session = self.sessions[number]
        index, event = session.to_d[0]
        session.to_d = session.to_d if keep else session.to_d[1:]
        t = self.transfers[index]
        if t.d is not None and t.d.state != "over":
            self.step_d(index, event)
        elif isinstance(event, k.PeerReserved):
            self.reserve(session, index)
        elif isinstance(event, k.PeerCompleted) and self.attempts(session.d_at, "was_ready", t):
            self.send(session, "p", index, k.PeerVerified())

    # Owners and the router.

    def start(self, number: int, p_at: int, d_at: int) -> None:
        """The router places an attempt, and the prefill worker schedules its first chunk."""
        blocks = self.pool(p_at, "allocate", self.scenario.requests[number])
        if isinstance(blocks, DiphaseError):
            return
        request = self.requests[number]
        index = request.transfer = len(self.transfers)
        session, refused = self.dial(p_at, d_at)
        machine = self.scenario.protocol.start_prefill(
            num_tokens=BLOCK_SIZE * self.scenario.requests[number] - 1,
            block_size=BLOCK_SIZE,
            num_layers=self.scenario.layers,
            layerwise=self.scenario.layerwise,
            max_push_runs=self.scenario.max_push_runs,
            timing=TIMING,
            now=NOW_S,
        )
        t = Transfer.of((None,) * len(Transfer.__slots__))
        t.request, t.attempt, t.session = number, request.attempt, session
        t.p, t.p_blocks, t.p_held = self._seat("p", machine), blocks, ()
        t.d_blocks = t.d_cached = t.writes = t.landed = t.endings = t.notices = t.checks = ()
        t.d_holds, t.damaged, t.computed, t.seeded = "none", frozenset(), 0, False
        t.p_reported = t.d_reported = ""
        t.p_ended = t.d_ended = False
        self.transfers.append(t)
        if refused:
            self.step_p(index, k.PeerGone(GONE))
        else:
            self.send(self.sessions[session], "d", index, k.PeerReserved())

    def dial(self, p_at: int, d_at: int) -> tuple[int, bool]:
        """The session to use, and whether it is refused: while the last one is not forgotten."""
        refused = False
        for number, old in enumerate(self.sessions):
            if (old.p_at, old.d_at) != (p_at, d_at):
                continue
            if not old.lost and old.p_side != "gone":
                return number, old.p_side == "closing"
            refused = refused or (not old.lost and old.d_side != "gone")
            for side in ("p", "d"):  # the dialled or the dialling worker is another one by now
                if side not in old.lost and getattr(old, f"{side}_side") == "up":
                    self.take_down(number, side)
        side = "gone" if refused else "up"
        self.sessions.append(Session.of((refused, d_at, (), side, "", p_at, (), side, (), ())))
        return len(self.sessions) - 1, refused

    def compute(self, index: int) -> None:
        """One step of the prompt, told layer by layer."""
        t = self.transfers[index]
        tokens = self.tokens(t, t.computed + 1)
        new = t.p_blocks[len(t.p_held) : -(-tokens // BLOCK_SIZE)]
        pushes = self.scenario.layerwise and len(t.p_held + new) > max(len(t.p_held), len(t.d_cached))
        for layer in range(self.scenario.layers):
            t.computed += layer == self.scenario.layers - 1
            if t.p.state not in ("settling", "fencing", "over"):
                self.pool(self.sessions[t.session].p_at, "acquire", new)
                t.p_held, new, before = t.p_held + new, (), len(t.writes)
                self.step_p(index, k.Computed(tokens, layer, 1))
                if t.p.state == "sending" and pushes and len(t.writes) == before:
                    raise Violation("3: a layer of a long prompt is computed and not pushed")

    def seed(self, index: int) -> None:
        """The first token is sampled; the scheduler lets go of the prompt."""
        t = self.transfers[index]
        t.seeded = True
        if t.p.state != "over":
            self.step_p(index, k.Seeded())
        self.free_scheduler(t)

    def finish(self, index: int) -> None:
        """The taker has generated everything."""
        self.free_taker(self.transfers[index])
        self.reports += ((index, "done"),)

    def hear(self, index: int, what: str) -> None:
        """The router hears of an attempt: that it is done, that it failed, or that its worker was lost."""
        at = self.reports.index((index, what))
        self.reports = self.reports[:at] + self.reports[at + 1 :]
        t = self.transfers[index]
        request = self.requests[t.request]
        if request.transfer != index or request.outcome:
            return
        if what == "done":
            request.outcome = "done"
            return
        if what == "lost p" and t.d_reported == "well":
            return
        self.cancel_both(index)
        request.attempt, request.transfer = request.attempt + 1, -1
        if request.attempt == self.scenario.max_attempts:
            request.outcome = "failed"

    def cancel_both(self, index: int) -> None:
        t = self.transfers[index]
        for side in ("p", "d"):
            if self.lives(t, side):
                self.cancels += ((index, side),)

    def lives(self, t: Any, side: str) -> bool:
        """Whether a Cancel from the router could still do anything there."""
        seat = getattr(t, side)
        if seat is None:  # its Reserve may be on its way
            return side == "d" and not self.sessions[t.session].cut
        return seat.state != "over" or bool(t.p_blocks if side == "p" else t.d_holds == "ready")

    def tidy(self) -> None:
        """Leaves out what has no consequence any more."""
        self.cancels = tuple(c for c in self.cancels if self.lives(self.transfers[c[0]], c[1]))
        self.reports = tuple(
            (index, what)
            for index, what in self.reports
            if self.requests[self.transfers[index].request].transfer == index
            and not self.requests[self.transfers[index].request].outcome
        )

    def cancel(self, index: int, side: str) -> None:
        """The router's Cancel reaches a worker."""
        self.cancels = tuple(c for c in self.cancels if c != (index, side))
        (self.end_p if side == "p" else self.end_d)(index)

    def end_p(self, index: int, fault: k.Fault = ENDED) -> None:
        t = self.transfers[index]
        if t.p is not None:
            t.p_ended = True
            if t.p.state != "over":
                self.step_p(index, k.Ended(fault))
            self.free_scheduler(t)

    # Bytes and fences.

    def land(self, index: int, part: int, intact: bool = True) -> None:
        """A write ends well: its bytes are there, and both sides will hear of it."""
        t = self.transfers[index]
        [write] = [w for w in t.writes if w.push.part == part]
        t.writes = tuple(w for w in t.writes if w is not write)
        push = write.push
        t.endings = (*t.endings, k.WriteEnded(part, None))
        if t.d_holds == "granted":
            t.landed = (*t.landed, push)
            t.damaged = t.damaged if intact else t.damaged | {part}
        if t.d is not None and t.d.state != "over":
            notice = k.PartArrived(part, push.first_block, push.num_blocks, push.first_layer, push.num_layers)
            t.notices = (*t.notices, notice)

    def end_write(self, index: int) -> None:
        t = self.transfers[index]
        event, t.endings = t.endings[0], t.endings[1:]
        self.step_p(index, event)

    def notice(self, index: int, event: k.PartArrived, keep: bool = False) -> None:
        t = self.transfers[index]
        if not keep:
            t.notices = tuple(n for n in t.notices if n != event)
        self.step_d(index, event)

    def digest(self, index: int, part: int) -> None:
        t = self.transfers[index]
        t.checks = tuple(p for p in t.checks if p != part)
        intact = part not in t.damaged and any(push.part == part for push in t.landed)
        self.step_d(index, k.PartChecked(part, intact))

    def fence_p(self, number: int, ok: bool) -> None:
        session = self.sessions[number]
        (index, parts), session.p_fences = session.p_fences[0], session.p_fences[1:]
        if ok:
            self.hold(parts, reads=False)
        if self.transfers[index].p.state != "over":
            self.step_p(index, k.FenceEnded(ok))

    def fence_d(self, number: int, ok: bool) -> None:
        session = self.sessions[number]
        (index, parts), session.d_fences = session.d_fences[0], session.d_fences[1:]
        if ok:
            self.hold(parts, lands=False)
        if self.transfers[index].d.state != "over":
            self.step_d(index, k.FenceEnded(ok))

    def hold(self, parts: frozenset[tuple[int, int]], **changes: bool) -> None:
        """A fence holds for these writes."""
        for index, t in enumerate(self.transfers):
            self.touch(t, frozenset(part for at, part in parts if at == index), **changes)

    # Sessions and processes.

    def bury(self, number: int, side: str) -> None:
        """The transport says PeerDown: what went over this connection touches this side no more."""
        session = self.sessions[number]
        setattr(session, f"{side}_side", "gone")
        for t in self.transfers:
            if t.session == number and side == "p":
                t.endings = ()
                self.touch(t, None, live=False, reads=False)
            elif t.session == number:
                t.notices = ()
                self.touch(t, None, lands=False)
        self.tell(number, side, k.PeerGone(GONE))

    def restart(self, at: int) -> None:
        """A new incarnation under the same address; its pool is fresh."""
        self.processes[at] = self._process(self.processes[at].role)
