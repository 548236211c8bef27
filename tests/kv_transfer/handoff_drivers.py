"""A model of what the drivers (sender.py, receiver.py) do with the machines that are on trial: their actions,
sessions, writes and blocks. What may happen in such a world is in handoff_world.py."""

from __future__ import annotations

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
from .handoff_steps import check_step

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
            self.check_action(t, action)
            self.act_p(index, t, action)
        if t.p.state == "over":
            t.p, t.endings = t.p.forgotten, ()

    def act_p(self, index: int, t: Any, action: k.Action) -> None:
        session = self.sessions[t.session]
        match action:
            case k.SendProgress(tokens):
                self.send(session, "d", index, k.PeerProgressed(tokens))
            case k.SendComplete(parts):
                self.send(session, "d", index, k.PeerCompleted(parts, self.scenario.recompute))
            case k.SendAbort(fault):
                self.send(session, "d", index, k.PeerAborted(fault))
            case k.Push():
                t.writes = (*t.writes, Write(action, live=True, reads=True, lands=session.d_side != "gone"))
            case k.CancelWrites():
                for write in t.writes:
                    if write.live:
                        self.fail_write(t, write, ENDED)
            case k.StartFence():
                if session.p_side == "up":
                    session.p_fences = (*session.p_fences, (index, self.cancelled(t.session)))
            case k.Disconnect():
                self.take_down(t.session, "p")
            case k.Release():
                self.pool(session.p_at, "release", t.p_held)
                t.p_held = ()
            case k.Report(fault):
                self.report(index, "p", fault)

    def tokens(self, t: Any, steps: int) -> int:
        """Of the prompt, computed in so many steps; its last block is not full."""
        blocks: int = self.scenario.requests[t.request]
        return min(BLOCK_SIZE * blocks - 1, BLOCK_SIZE * (blocks * steps // self.scenario.steps))

    def check_action(self, t: Any, action: k.Action) -> None:
        """Whether what the prefill machine wants to be done is true, and safe."""
        match action:
            case k.Push():
                if action.first_block + action.num_blocks > len(t.p_held):
                    raise Violation("3: blocks are pushed that are not computed")
                if not self.scenario.layerwise and action.num_layers != self.scenario.layers:
                    raise Violation("3: a short prompt is pushed layer by layer")
            case k.SendProgress(tokens) if tokens != self.tokens(t, t.computed):
                raise Violation(f"3: Progress says that {tokens} tokens are computed")
            case k.SendComplete() if t.computed < self.scenario.steps or not t.seeded:
                raise Violation("3: Complete was said before everything was pushed")
            case k.StartFence() if not any(write.reads for write in t.writes):
                raise Violation("2: blocks wait for a fence though every write ended well")
            case k.Release() if t.endings or any(write.live for write in t.writes):
                raise Violation("1: prefill gives blocks back while a write is not terminal")

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
        begin = end = 0
        if not self.scenario.recompute:
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
            cached = self.cached(at, t)
            blocks = self.pool(at, "allocate", t.d.machine.num_blocks - len(cached))
            if isinstance(blocks, DiphaseError):
                self.pool(at, "release", cached)
                return
            process.waiting = process.waiting[1:]
            t.d_cached, t.d_blocks, t.d_holds = cached, blocks, "granted"
            self.step_d(index, k.RoomFound(len(cached)))

    def cached(self, at: int, t: Any) -> tuple[int, ...]:
        """The leading blocks of a prompt that decode has; a reference to each is taken."""
        return ()

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
            if all(other.attempt < t.attempt for other in here):
                raise Violation("3: a new attempt is refused")
            self.send(session, "p", index, k.PeerRefused(FAILED))
            return
        if any(other.attempt >= t.attempt for other in here):
            raise Violation("3: a stale attempt is taken")
        for older, other in enumerate(self.transfers):
            named = overtaken == HandoffKey(f"r{other.request}", other.attempt)
            if named and other in here and other.d.state != "over":
                self.end_d(older)
        if any(other.d.state in ("waiting", "reserved", "filling", "verifying") for other in here):
            raise Violation("3: an older attempt goes on beside a newer one")
        t.d = self._seat(
            "d",
            self.scenario.protocol.start_decode(
                num_blocks=self.scenario.requests[t.request],
                num_layers=self.scenario.layers,
                timing=TIMING,
                now=NOW_S,
            ),
        )
        if t.d.due > 0.0:
            raise Violation("4: who waits for room does not say so at once")
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
