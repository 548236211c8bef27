"""What must hold in a world of hand-offs: docs/handoff.md, Invariants."""

from __future__ import annotations

import math
from typing import Any

from .handoff_faults import FaultyWorld
from .handoff_parts import TIMING, Violation

HELD = {
    "waiting": {"none"},
    "reserved": {"granted"},
    "filling": {"granted"},
    "verifying": {"granted"},
    "quarantined": {"quarantined"},
    "fencing": {"quarantined"},
    "over": {"none", "ready", "free"},
}
"""State of the decode machine -> who has its blocks."""
LONGEST_S = max(TIMING.lease_s, TIMING.reserve_timeout_s, TIMING.tail_timeout_s, TIMING.progress_timeout_s)


def check(world: FaultyWorld) -> None:
    """Raises Violation unless every invariant about one moment holds."""
    for t in world.transfers:
        for write in t.writes:
            if write.reads and not t.p_held:
                raise Violation("1: a write may still read blocks that prefill has given back")
            if write.lands and t.d_holds not in ("granted", "quarantined"):
                raise Violation(f"1: a write may still land in blocks that are {t.d_holds}")
        check_machines(t)
    check_pools(world)


def check_machines(t: Any) -> None:
    """The states mean what docs/handoff.md says."""
    if t.p is not None:
        if t.p.state == "over" and t.p_held:
            raise Violation("2: prefill is over and still holds blocks")
        if t.p.state == "sent" and not t.seeded:
            raise Violation("3: Complete was said before the first token")
        if t.p_reported == "well" and not t.p.machine.seeded:
            raise Violation("3: Sent before everything was pushed")
        if t.p.state not in ("settling", "over") and t.p_reported == "well":
            raise Violation(f"3: Sent, and then {t.p.state}")
    if t.d is not None:
        machine = t.d.machine
        if t.d_holds not in HELD[t.d.state]:
            raise Violation(f"2: decode is {t.d.state}, and its blocks are {t.d_holds}")
        if (t.d.state == "verifying") != (machine.num_parts is not None) and t.d.state in (
            "reserved",
            "filling",
            "verifying",
        ):
            raise Violation(f"3: decode is {t.d.state} with Complete for {machine.num_parts} parts")
        if t.d.state == "reserved" and machine.arrived:
            raise Violation("3: something arrived, and decode is reserved")
        if not machine.checked <= machine.arrived:
            raise Violation("3: a part is checked that never arrived")


def check_pools(world: FaultyWorld) -> None:
    """Free + cached + used + quarantined = total, and each is what somebody has."""
    for at, process in enumerate(world.processes):
        if not process.alive:
            continue
        used: set[int] = set()
        quarantined: set[int] = set()
        for t in world.transfers:
            session = world.sessions[t.session]
            if process.role == "p" and session.p_at == at and t.p is not None:
                used.update(t.p_blocks, t.p_held)
            elif process.role == "d" and session.d_at == at and t.d is not None:
                used.update(t.d_cached)
                (quarantined if t.d_holds == "quarantined" else used).update(t.d_blocks)
        counts = process.pool.value.counts()
        if counts.free + counts.cached + counts.used + counts.quarantined != counts.total:
            raise Violation(f"2: {counts} do not add up")
        if (counts.used, counts.quarantined) != (len(used - quarantined), len(quarantined)):
            raise Violation(f"2: {counts}, but {len(used)} are held and {len(quarantined)} in quarantine")


def drain(world: FaultyWorld, known: set[Any]) -> None:
    """Faults stop: everything is idle within the longest deadline. `known` are states of which that is
    known."""
    passed_s = 0.0
    on_the_way = []
    for _ in range(2000):
        move = next(world.moves(), None)
        if move is not None:
            world.make(move)
            check(world)
            continue
        state = world.freeze()
        if state in known:
            break
        on_the_way.append(state)
        wait_s = next_deadline(world)
        if wait_s == math.inf:
            check_idle(world)
            break
        passed_s += wait_s
        if passed_s > LONGEST_S:
            raise Violation(f"4: {passed_s:g} s after the last fault something still waits")
        pass_time(world, wait_s)
        check(world)
    else:
        raise Violation("4: it never comes to rest")
    known.update(on_the_way)


def seats(world: FaultyWorld) -> list[tuple[int, str, Any]]:
    """(transfer, side, machine) of all that is not over."""
    return [
        (index, side, seat)
        for index, t in enumerate(world.transfers)
        for side, seat in (("p", t.p), ("d", t.d))
        if seat is not None and seat.state != "over"
    ]


def next_deadline(world: FaultyWorld) -> float:
    """Seconds until the first machine wants a Tick."""
    return max(0.0, min((seat.due for _, _, seat in seats(world)), default=math.inf))


def pass_time(world: FaultyWorld, seconds: float) -> None:
    """For all alike; those that are due tick."""
    for index, side, seat in seats(world):
        setattr(world.transfers[index], side, seat.later(seconds))
    for index, side, seat in seats(world):
        if seat.due <= 0.0 and getattr(world.transfers[index], side) is seat:
            world.tick(index, side)


def check_idle(world: FaultyWorld) -> None:
    for index, side, seat in seats(world):
        raise Violation(f"4: transfer {index} waits for ever: {side} is {seat.state}")
    for t in world.transfers:
        if t.writes or t.d_holds in ("granted", "quarantined", "ready"):
            raise Violation(f"4: {t.writes} and {t.d_holds} blocks are left")
    for process in world.processes:
        counts = process.pool.value.counts()
        if counts.used or counts.quarantined:
            raise Violation(f"4: the pool of a {process.role} process is not idle: {counts}")
    for number, request in enumerate(world.requests):
        if not request.outcome:
            raise Violation(f"3: request {number} never ends")
