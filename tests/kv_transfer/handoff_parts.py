"""What a world of hand-offs is made of: values that compare by identity, so that a state is a small tuple.

A world (handoff_world.py) is explored state by state (exploration.py) or played at random
(test_machine_invariants.py). Either way its parts are records of immutable values; machines and pools are
wrapped so that equal ones are one object, and what they do next is worked out once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields, replace
from operator import attrgetter
from typing import Any, NamedTuple

from diphase.kv_transfer import decode_side, prefill_side
from diphase.kv_transfer import machine as k
from diphase.kv_transfer.admission import NewestAttempts
from diphase.proto.errors import DiphaseError

TIMING = k.Timing(reserve_timeout_s=5.0, lease_s=30.0, progress_timeout_s=2.0, tail_timeout_s=10.0)
BLOCK_SIZE = 4
NOW_S = 1000.0
"""What every machine's clock says: what passes is taken off the machine's times."""
GONE = k.Fault("peer_lost", "gone")
FAILED = k.Fault("transfer", "failed")
ENDED = k.Fault(k.CANCELLED, "ended")


class Violation(AssertionError):
    """An invariant of docs/handoff.md does not hold."""


def plain(fault: k.Fault) -> k.Fault:
    """Which fault it was matters only to people; machines ask whether it was a cancel."""
    return ENDED if fault.code == k.CANCELLED else FAILED


class Protocol(NamedTuple):
    """What is on trial: the two machines and the memory of attempts."""

    start_prefill: Callable[..., Any] = prefill_side.start_prefill
    step_prefill: Callable[..., Any] = prefill_side.step_prefill
    start_decode: Callable[..., Any] = decode_side.start_decode
    step_decode: Callable[..., Any] = decode_side.step_decode
    newest_attempts: Callable[[], Any] = NewestAttempts


class Seat:
    """One value of a machine, with a clock of its own; equal values sit in one seat."""

    __slots__ = ("book", "due", "machine", "memo", "state", "step")

    due: float
    """Seconds until it wants a Tick."""

    def __init__(self, machine: Any, step: Callable[..., Any], book: dict[Any, Seat]) -> None:
        self.machine, self.step, self.book = machine, step, book
        self.state: str = str(machine.state)
        self.due: float = machine.due - NOW_S
        self.memo: dict[Any, tuple[Seat, k.Actions]] = {}

    def after(self, event: k.Event) -> tuple[Seat, k.Actions]:
        known = self.memo.get(event)
        if known is None:
            machine, actions = self.step(self.machine, event, NOW_S)
            actions = tuple(
                replace(a, fault=plain(a.fault)) if getattr(a, "fault", None) else a for a in actions
            )
            known = self.memo[event] = self._seat(machine), actions
        return known

    @property
    def forgotten(self) -> Seat:
        """The same with what no longer matters left out, now that it is over."""
        known = self.memo.get("forgotten")
        if known is None:
            keep = {"state", "seeded", "ready", "pushed", "covered", "arrived", "checked", "num_parts"}
            start = {f.name: f.default for f in fields(self.machine) if f.default is not MISSING}
            bare = {name: value for name, value in start.items() if name not in keep}
            known = self.memo["forgotten"] = self._seat(replace(self.machine, **bare)), ()
        return known[0]

    def later(self, seconds: float) -> Seat:
        """The same machine when so much time has passed and nothing else has happened."""
        known = self.memo.get(seconds)
        if known is None:
            times = [f.name for f in fields(self.machine) if f.name.endswith("_at")]
            moved = {name: round(getattr(self.machine, name) - seconds, 6) for name in times}
            known = self.memo[seconds] = self._seat(replace(self.machine, **moved)), ()
        return known[0]

    def _seat(self, machine: Any) -> Seat:
        fault = getattr(machine, "fault", None)
        if fault is not None:
            machine = replace(machine, fault=plain(fault))
        seat = self.book.get(machine)
        if seat is None:
            seat = self.book[machine] = Seat(machine, self.step, self.book)
        return seat


class Box:
    """One value of a block manager or of another object with state; it never changes, `do` gives the next."""

    __slots__ = ("book", "memo", "value")

    def __init__(self, value: Any, book: dict[str, Box]) -> None:
        self.value, self.book = value, book
        self.memo: dict[Any, tuple[Box, Any]] = {}

    def do(self, method: str, *args: Any) -> tuple[Box, Any]:
        """The next box, and what the method returned or the DiphaseError that it raised."""
        known = self.memo.get((method, args))
        if known is None:
            value = copy.deepcopy(self.value)
            try:
                result = getattr(value, method)(*args)
            except DiphaseError as error:
                result = error
            key = repr(vars(value))
            box = self.book.get(key) or self.book.setdefault(key, Box(value, self.book))
            known = self.memo[method, args] = box, tuple(result) if isinstance(result, list) else result
        return known


class Record:
    """A few values under names; `values` are what makes two of them equal."""

    __slots__: tuple[str, ...] = ()

    @classmethod
    def of(cls, values: tuple[Any, ...]) -> Any:
        record = cls.__new__(cls)
        for name, value in zip(cls.__slots__, values, strict=True):
            setattr(record, name, value)
        return record

    @property
    def values(self) -> tuple[Any, ...]:
        return attrgetter(*self.__slots__)(self)  # type: ignore[no-any-return,unused-ignore]


class Write(NamedTuple):
    """A write that may still touch something."""

    push: k.Push
    live: bool
    """The writer waits for its end."""
    reads: bool
    """It may read the blocks it comes from."""
    lands: bool
    """Its bytes may arrive."""


class Transfer(Record):
    """One attempt at a request, as both sides have it."""

    __slots__ = (
        "attempt", "checks", "computed", "d", "d_blocks", "d_cached", "d_ended", "d_holds", "d_reported",
        "damaged", "endings", "landed", "notices", "p", "p_blocks", "p_ended", "p_held", "p_reported",
        "request", "seeded", "session", "writes",
    )  # fmt: skip

    request: int
    attempt: int
    session: int
    p: Seat | None
    """None: the process is gone. `over`: forgotten."""
    d: Seat | None
    p_blocks: tuple[int, ...]
    """The scheduler's references, until the first token."""
    p_held: tuple[int, ...]
    """The sender's references."""
    d_blocks: tuple[int, ...]
    d_cached: tuple[int, ...]
    d_holds: str
    """none, granted, quarantined, ready (they are the taker's), free."""
    writes: tuple[Write, ...]
    damaged: frozenset[int]
    landed: tuple[k.Push, ...]
    endings: tuple[k.WriteEnded, ...]
    notices: tuple[k.PartArrived, ...]
    checks: tuple[int, ...]
    computed: int
    """Steps of computing that are done."""
    seeded: bool
    p_reported: str
    """"", a code of proto/errors.py, or "well"."""
    d_reported: str
    p_ended: bool
    """By its own owner, who wants no report."""
    d_ended: bool


class Session(Record):
    """A link and a connection between one prefill and one decode process."""

    __slots__ = ("cut", "d_at", "d_fences", "d_side", "lost", "p_at", "p_fences", "p_side", "to_d", "to_p")

    p_at: int
    d_at: int
    p_side: str
    """up, closing (LinkLost was told), gone (PeerGone was told)."""
    d_side: str
    cut: bool
    lost: str
    """Sides (p, d) whose process is gone."""
    to_p: tuple[tuple[int, k.Event], ...]
    """In order: (transfer, event)."""
    to_d: tuple[tuple[int, k.Event], ...]
    p_fences: tuple[tuple[int, frozenset[tuple[int, int]]], ...]
    """In order: who asked, and the writes (transfer, part) that were cancelled by then."""
    d_fences: tuple[tuple[int, frozenset[tuple[int, int]]], ...]


class Process(Record):
    """One worker; `attempts` and `waiting` are the decode side's."""

    __slots__ = ("alive", "attempts", "pool", "role", "waiting")

    role: str
    alive: bool
    pool: Box
    attempts: Box
    waiting: tuple[int, ...]


class Request(Record):
    """What the router knows of a request."""

    __slots__ = ("attempt", "outcome", "transfer")

    attempt: int
    transfer: int
    """-1: not placed."""
    outcome: str
    """"" while it runs; then done, failed or cancelled, for ever."""


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A world's size, and how much may go wrong in it."""

    name: str
    requests: tuple[int, ...] = (2,)
    """Blocks of each."""
    steps: int = 1
    """In how many steps a prompt is computed."""
    layerwise: bool = False
    layers: int = 1
    max_push_runs: int = 8
    decode_blocks: int = 2
    max_attempts: int = 1
    pairs: tuple[int, int] = (1, 1)
    """Prefill and decode processes."""
    faults: dict[str, int] = field(default_factory=dict)
    """How often each kind of fault may happen, and how many in all ("total")."""
    moves: int = 1000
    """The longest history."""
    recompute: bool = False
    """Prefill finds that decode computes the prompt sooner than the link brings it: no KV moves."""
    prompt: bool = False
    """Nothing takes time but computing: any failure is a false alarm."""
    protocol: Protocol = field(default_factory=Protocol)
    strays: tuple[tuple[str, str, type], ...] = ()
    """Cells (side, state, event) that refuse: such an event may come out of nowhere."""
