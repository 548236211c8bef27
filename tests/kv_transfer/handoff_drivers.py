"""A model of what the drivers (sender.py, receiver.py) do with the machines that are on trial: their actions,
sessions, writes and blocks. What may happen in such a world is in handoff_world.py."""

from __future__ import annotations

import math
from typing import Any, Self

from diphase.engine.block_manager import BlockManager
from diphase.kv_transfer import machine as k
from diphase.proto.errors import DiphaseError
from diphase.proto.ids import HandoffKey

from .handoff_parts import (
    BLOCK_SIZE,
    ENDED,
    FAILED,
    GONE,
    NOW_S,
    TIMING,
    Box,
    Process,
    Request,
    Scenario,
    Seat,
    Session,
    Transfer,
    Violation,
    Write,
)

Move = tuple[Any, ...]
"""Name of a method of World, and its arguments."""
Frozen = tuple[Any, ...]


class Books:
    """Every value that occurred, so that equal ones are one object."""

    def __init__(self) -> None:
        self.seats: dict[str, dict[Any, Seat]] = {"p": {}, "d": {}}
        self.boxes: dict[str, Box] = {}


class Drivers:
    """See the module's paragraph. A move changes it in place; `freeze` and `thaw` go from state to state."""

    def __init__(self, scenario: Scenario, books: Books | None = None) -> None:
        self.scenario = scenario
        self.books = books or Books()
        self.transfers: list[Any] = []
        self.sessions: list[Any] = []
        roles = "p" * scenario.pairs[0] + "d" * scenario.pairs[1]
        self.processes: list[Any] = [self._process(role) for role in roles]
        self.requests: list[Any] = [Request.of((0, "", -1)) for _ in scenario.requests]
        self.reports: tuple[tuple[int, str], ...] = ()
        """To the router, in any order: (transfer, what)."""
        self.cancels: tuple[tuple[int, str], ...] = ()
        """From the router, in any order: (transfer, side)."""
        self.budget: dict[str, int] = dict(scenario.faults)

    def _process(self, role: str) -> Any:
        blocks = self.scenario.decode_blocks if role == "d" else 2 * sum(self.scenario.requests)
        pool = BlockManager(blocks, BLOCK_SIZE)
        attempts = self.scenario.protocol.newest_attempts()
        return Process.of((True, self._box(attempts), self._box(pool), role, ()))

    def _box(self, value: Any) -> Box:
        return self.books.boxes.setdefault(repr(vars(value)), Box(value, self.books.boxes))

    def _seat(self, side: str, machine: Any) -> Seat:
        book, protocol = self.books.seats[side], self.scenario.protocol
        if machine not in book:
            step = protocol.step_prefill if side == "p" else protocol.step_decode
            book[machine] = Seat(machine, step, book)
        return book[machine]

    # States.

    def freeze(self) -> Frozen:
        return (
            tuple(t.values for t in self.transfers),
            tuple(s.values for s in self.sessions),
            tuple(p.values for p in self.processes),
            tuple(r.values for r in self.requests),
            tuple(sorted(self.reports)),
            tuple(sorted(self.cancels)),
            tuple(self.budget.items()),
        )

    def thaw(self, state: Frozen) -> Self:
        world = object.__new__(type(self))
        world.scenario, world.books = self.scenario, self.books
        world.transfers = [Transfer.of(values) for values in state[0]]
        world.sessions = [Session.of(values) for values in state[1]]
        world.processes = [Process.of(values) for values in state[2]]
        world.requests = [Request.of(values) for values in state[3]]
        world.reports, world.cancels = state[4], state[5]
        world.budget = dict(state[6])
        return world

    def pool(self, at: int, method: str, *args: Any) -> Any:
        """Calls the pool of a process; ValueError and KeyError are those of a double release."""
        process = self.processes[at]
        process.pool, result = process.pool.do(method, *args)
        return result

    # The drivers' turns.

    def step_p(self, index: int, event: k.Event) -> None:
        t = self.transfers[index]
        if t.p is None:
            return
        before = t.p
        t.p, actions = before.after(event)
        check_step(before, event, t.p, actions)
        for action in actions:
            self.act_p(index, t, action)
        if t.p.state == "over":
            t.p, t.endings = t.p.forgotten, ()

    def act_p(self, index: int, t: Any, action: k.Action) -> None:
        session = self.sessions[t.session]
        match action:
            case k.SendProgress(tokens):
                if tokens != self.tokens(t, t.computed):
                    raise Violation(f"3: Progress says that {tokens} tokens are computed")
                self.send(session, "d", index, k.PeerProgressed(tokens))
            case k.SendComplete(parts):
                if t.computed < self.scenario.steps or not t.seeded:
                    raise Violation("3: Complete was said before everything was pushed")
                self.send(session, "d", index, k.PeerCompleted(parts))
            case k.SendAbort(fault):
                self.send(session, "d", index, k.PeerAborted(fault))
            case k.Push():
                self.check_push(t, action)
                t.writes = (*t.writes, Write(action, live=True, reads=True, lands=session.d_side != "gone"))
            case k.CancelWrites():
                for write in t.writes:
                    if write.live:
                        self.fail_write(t, write, ENDED)
            case k.StartFence():
                if not any(write.reads for write in t.writes):
                    raise Violation("2: blocks wait for a fence though every write ended well")
                if session.p_side == "up":
                    session.p_fences = (*session.p_fences, (index, self.cancelled(t.session)))
            case k.Disconnect():
                self.take_down(t.session, "p")
            case k.Release():
                if t.endings or any(write.live for write in t.writes):
                    raise Violation("1: prefill gives blocks back while a write is not terminal")
                self.pool(session.p_at, "release", t.p_held)
                t.p_held = ()
            case k.Report(fault):
                self.report(index, "p", fault)

    def tokens(self, t: Any, steps: int) -> int:
        """Of the prompt, computed in so many steps; its last block is not full."""
        blocks: int = self.scenario.requests[t.request]
        return min(BLOCK_SIZE * blocks - 1, BLOCK_SIZE * (blocks * steps // self.scenario.steps))

    def check_push(self, t: Any, push: k.Push) -> None:
        if push.first_block + push.num_blocks > len(t.p_held):
            raise Violation("3: blocks are pushed that are not computed")
        if not self.scenario.layerwise and push.num_layers != self.scenario.layers:
            raise Violation("3: a short prompt is pushed layer by layer")

    def step_d(self, index: int, event: k.Event) -> None:
        t = self.transfers[index]
        if t.d is None:
            return
        before = t.d
        t.d, actions = before.after(event)
        check_step(before, event, t.d, actions)
        if isinstance(event, k.PartArrived) and k.Check(event.part) in actions:
            self.check_names(t, event)
        for action in actions:
            self.act_d(index, t, action)
        if t.d.state == "over":
            t.d, t.notices, t.checks = t.d.forgotten, (), ()
            t.landed, t.damaged = (), frozenset()
            process = self.processes[self.sessions[t.session].d_at]
            process.waiting = tuple(i for i in process.waiting if i != index)

    def act_d(self, index: int, t: Any, action: k.Action) -> None:
        session = self.sessions[t.session]
        match action:
            case k.SendGranted():
                self.send(session, "p", index, k.PeerGranted(len(t.d_cached), len(t.d_blocks)))
            case k.SendQueued():
                self.send(session, "p", index, k.PeerQueued(t.d.machine.timing.lease_s))
            case k.SendVerified():
                self.send(session, "p", index, k.PeerVerified())
            case k.SendAbort(fault):
                self.send(session, "p", index, k.PeerAborted(fault))
            case k.Check(part):
                t.checks = (*t.checks, part)
            case k.StartFence():
                if session.d_side == "up":
                    session.d_fences = (*session.d_fences, (index, self.cancelled(t.session)))
            case k.Quarantine():
                self.pool(session.d_at, "release", t.d_cached)
                self.pool(session.d_at, "quarantine", t.d_blocks)
                t.d_cached, t.d_holds = (), "quarantined"
            case k.Lift():
                self.pool(session.d_at, "lift", t.d_blocks)
                t.d_blocks, t.d_holds = (), "free"
            case k.Release():
                self.pool(session.d_at, "release", t.d_cached + t.d_blocks)
                t.d_cached, t.d_blocks, t.d_holds = (), (), "free"
            case k.Report(fault):
                self.report(index, "d", fault)

    def report(self, index: int, side: str, fault: k.Fault | None) -> None:
        t = self.transfers[index]
        if getattr(t, f"{side}_reported"):
            raise Violation(f"{side} reports a second time")
        if getattr(t, f"{side}_ended"):
            raise Violation(f"{side} reports to an owner who ended it himself")
        if fault is not None and self.scenario.prompt:
            raise Violation(f"{side} gives a false alarm")
        if fault is not None and fault.code == k.CANCELLED and side == "d":
            raise Violation("an end that is nobody's failure is reported")
        setattr(t, f"{side}_reported", "well" if fault is None else "failed")
        if fault is not None:
            self.reports += ((index, "failed"),)
            if side == "p":
                self.free_scheduler(t)
        elif side == "d":
            t.d_holds = "ready"
            self.check_ready(t)
        elif t.d is not None and t.d_reported != "well":
            raise Violation("Sent without Ready")

    def check_names(self, t: Any, part: k.PartArrived) -> None:
        """Only bytes that were granted are looked at."""
        first, end = len(t.d_cached), len(t.d_cached) + len(t.d_blocks)
        within = first <= part.first_block < part.first_block + part.num_blocks <= end
        last_layer = part.first_layer + part.num_layers
        if not within or not 0 <= part.first_layer < last_layer <= self.scenario.layers:
            raise Violation(f"3: a part with {part} of blocks {first} to {end} is looked at")

    def check_ready(self, t: Any) -> None:
        """Ready: every byte of every block that was to be sent, exactly once, undamaged."""
        if t.damaged or t.checks:
            raise Violation(f"3: Ready, and of its parts {t.damaged} are damaged and {t.checks} not compared")
        begin, end = len(t.d_cached), len(t.d_cached) + len(t.d_blocks)
        want = sorted((b, layer) for b in range(begin, end) for layer in range(self.scenario.layers))
        have = sorted(
            (block, layer)
            for push in t.landed
            for block in range(push.first_block, push.first_block + push.num_blocks)
            for layer in range(push.first_layer, push.first_layer + push.num_layers)
        )
        if want != have:
            raise Violation(f"Ready with {have} of {want}")

    def send(self, session: Any, to: str, index: int, event: k.Event) -> None:
        if not session.cut:
            name = f"to_{to}"
            setattr(session, name, (*getattr(session, name), (index, event)))

    def fail_write(self, t: Any, write: Write, fault: k.Fault) -> None:
        """It ends at the writer; its bytes may be read and arrive as before."""
        t.writes = tuple(w._replace(live=False) if w is write else w for w in t.writes)
        t.endings = (*t.endings, k.WriteEnded(write.push.part, fault))

    def cancelled(self, session: int) -> frozenset[tuple[int, int]]:
        return frozenset(
            (index, write.push.part)
            for index, t in enumerate(self.transfers)
            if t.session == session
            for write in t.writes
            if not write.live
        )

    def touch(self, t: Any, parts: frozenset[int] | None, **changes: bool) -> None:
        """What the writes of these parts (None: all) may still touch; those that touch nothing are over."""
        writes = (w._replace(**changes) if parts is None or w.push.part in parts else w for w in t.writes)
        t.writes = tuple(w for w in writes if w.live or w.reads or w.lands)

    def take_down(self, number: int, side: str) -> None:
        """One side ends both planes; the other will see it."""
        session = self.sessions[number]
        if getattr(session, f"{side}_side") != "up":
            return
        session.cut, session.to_p, session.to_d = True, (), ()
        setattr(session, f"{side}_side", "closing")
        setattr(session, f"{side}_fences", ())
        self.tell(number, side, k.LinkLost(GONE))

    def tell(self, number: int, side: str, event: k.Event) -> None:
        for index, t in enumerate(self.transfers):
            seat = getattr(t, side)
            if t.session == number and seat is not None and seat.state != "over":
                (self.step_p if side == "p" else self.step_d)(index, event)

    def give_room(self, at: int) -> None:
        process = self.processes[at]
        while process.waiting:
            index = process.waiting[0]
            t = self.transfers[index]
            blocks = self.pool(at, "allocate", t.d.machine.num_blocks)
            if isinstance(blocks, DiphaseError):
                return
            process.waiting = process.waiting[1:]
            t.d_blocks, t.d_holds = blocks, "granted"
            self.step_d(index, k.RoomFound(0))

    def attempts(self, at: int, method: str, t: Any) -> Any:
        process = self.processes[at]
        process.attempts, result = process.attempts.do(method, HandoffKey(f"r{t.request}", t.attempt))
        return result

    def reserve(self, session: Any, index: int) -> None:
        t = self.transfers[index]
        here = [o for o in self.transfers if o.request == t.request and o.d is not None]
        here = [o for o in here if self.sessions[o.session].d_at == session.d_at]
        overtaken = self.attempts(session.d_at, "begin", t)
        if isinstance(overtaken, DiphaseError):
            self.send(session, "p", index, k.PeerRefused(FAILED))
            return
        if any(other.attempt >= t.attempt for other in here):
            raise Violation("3: a stale attempt is taken")
        for older, other in enumerate(self.transfers):
            if overtaken == HandoffKey(f"r{other.request}", other.attempt) and other.d is not None:
                if other.d.state != "over" and self.sessions[other.session].d_at == session.d_at:
                    self.end_d(older)
        t.d = self._seat(
            "d",
            self.scenario.protocol.start_decode(
                num_blocks=self.scenario.requests[t.request],
                num_layers=self.scenario.layers,
                timing=TIMING,
                now=NOW_S,
            ),
        )
        process = self.processes[session.d_at]
        process.waiting = (*process.waiting, index)
        self.give_room(session.d_at)
        if index in process.waiting:
            self.step_d(index, k.Tick())

    def end_d(self, index: int) -> None:
        """The decode worker's owner wants it over, whether the receiver or the taker has it."""
        t = self.transfers[index]
        if t.d is not None:
            t.d_ended = True
            if t.d.state != "over":
                self.step_d(index, k.Ended(ENDED))
            if t.d_holds == "ready":
                self.free_taker(t)

    def free_scheduler(self, t: Any) -> None:
        """The prefill worker's scheduler lets go of the prompt's blocks."""
        self.pool(self.sessions[t.session].p_at, "release", t.p_blocks)
        t.p_blocks = ()

    def free_taker(self, t: Any) -> None:
        self.pool(self.sessions[t.session].d_at, "release", t.d_cached + t.d_blocks)
        t.d_cached, t.d_blocks, t.d_holds = (), (), "free"


def check_step(before: Seat, event: k.Event, after: Seat, actions: k.Actions) -> None:
    """What docs/handoff.md says of deadlines, where one step shows it."""
    old, new = before.machine, after.machine
    if after.state in ("settling", "fencing", "over") and after.due < math.inf:
        raise Violation(f"4: what is {after.state} wants a Tick")
    if after.state in ("reserved", "filling", "verifying"):
        if after.due > TIMING.progress_timeout_s or (after.state == "verifying") > (new.completed_at < math.inf):
            raise Violation("4: decode waits for too long")
    if isinstance(event, k.PartArrived) and event.part in getattr(old, "arrived", ()) and new is not old:
        raise Violation("3: a repeated part does something")
    if isinstance(event, k.PeerAborted) and event.fault.code != k.CANCELLED:
        if before.state in ("waiting", "reserved", "filling", "verifying") and k.Report(FAILED) not in actions:
            raise Violation("4: decode keeps a failure to itself")
    if isinstance(event, k.PeerGranted) and before.state != after.state and after.state in ("sending", "sent"):
        if event.first_block + event.num_blocks != new.num_blocks:
            raise Violation("3: blocks are pushed for which there is no room")
    if k.Disconnect() in actions and event != k.FenceEnded(False):
        raise Violation("4: a connection is taken down though its fence holds")
    if after.state in ("sending", "sent") and new.live:
        first = not getattr(old, "live", ())
        if first and new.moved_at != NOW_S:
            raise Violation("4: a write does not get its whole time")
        if not first and isinstance(event, k.Computed | k.Seeded) and new.moved_at > old.moved_at:
            raise Violation("4: a push puts the deadline of the writes before it off")
        if after.due > new.moved_at + TIMING.progress_timeout_s - NOW_S:
            raise Violation("4: a write is waited for too long")
    news = {
        k.RoomFound: ("reserved",),
        k.WriteEnded: ("sending", "sent"),
        k.PeerProgressed: ("filling",),
        k.PeerCompleted: ("verifying",),
        k.PartArrived: ("filling", "verifying"),
    }.get(type(event), ())
    refused = any(isinstance(action, k.Refuse) for action in actions)
    if after.state in news and not refused and new.moved_at != NOW_S:
        raise Violation(f"4: {type(event).__name__} gives no new time")
