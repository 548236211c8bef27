"""Both machines of one hand-off, a model of what their drivers do, and an adversarial network between
them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

from diphase.kv_transfer import machine as k
from diphase.kv_transfer.decode_side import Decode, DecodeState, start_decode, step_decode
from diphase.kv_transfer.prefill_side import Prefill, PrefillState, start_prefill, step_prefill

TIMING = k.Timing(reserve_timeout_s=5.0, lease_s=30.0, progress_timeout_s=2.0, tail_timeout_s=10.0)
LAYERS = 4
BLOCK = 4
LIVE, CANCELLED, BUFFERED = "live", "cancelled", "buffered"
"""Of a write: runs; ended at the writer but may still read and land; may still land."""


class HandoffWorld:
    """One hand-off between a prefill process `p` and a decode process `d`."""

    def __init__(self, tokens: int, layerwise: bool, cached: int) -> None:
        self.now = 0.0
        self.tokens = tokens
        self.blocks = -(-tokens // BLOCK)
        self.cached = min(cached, tokens // BLOCK)
        self.p: Prefill | None = start_prefill(
            num_tokens=tokens,
            block_size=BLOCK,
            num_layers=LAYERS,
            layerwise=layerwise,
            max_push_runs=2 * LAYERS,
            timing=TIMING,
            now=0.0,
        )
        self.d: Decode | None = start_decode(
            num_blocks=self.blocks, num_layers=LAYERS, timing=TIMING, now=0.0
        )
        self.to_p: deque[k.Event] = deque()
        self.to_d: deque[k.Event] = deque()
        self.notices: deque[k.PartArrived] = deque()
        self.checks: deque[int] = deque()
        self.endings: deque[k.WriteEnded] = deque()
        self.writes: dict[int, tuple[str, k.Push]] = {}
        self.damaged: set[int] = set()
        self.landed: list[k.Push] = []
        self.p_fence = self.d_fence = False
        self.linked = True
        self.computed = 0
        self.seeded = False
        self.p_holds = True
        self.d_blocks = "none"  # none, granted, quarantined, ready, free
        self.p_reports: list[k.Fault | None] = []
        self.d_reports: list[k.Fault | None] = []
        self.p_told_off = self.d_told_off = False  # by its own owner

    # What the drivers do.

    def step_p(self, event: k.Event) -> None:
        if self.p is None or (self.p.state is PrefillState.OVER and not isinstance(event, k.PeerAborted)):
            return
        self.p, actions = step_prefill(self.p, event, self.now)
        for action in actions:
            self.act_p(action)

    def act_p(self, action: k.Action) -> None:
        match action:
            case k.SendProgress(tokens):
                self.send_d(k.PeerProgressed(tokens))
            case k.SendComplete(parts):
                self.send_d(k.PeerCompleted(parts))
            case k.SendAbort(fault):
                self.send_d(k.PeerAborted(fault))
            case k.Push():
                self.writes[action.part] = (LIVE, action)
            case k.CancelWrites():
                for part, (state, push) in list(self.writes.items()):
                    if state == LIVE:
                        self.writes[part] = (CANCELLED, push)
                        self.endings.append(k.WriteEnded(part, k.Fault(k.CANCELLED, "cancelled")))
            case k.StartFence():
                self.p_fence = True
            case k.Disconnect():
                self.break_link()
            case k.Release():
                assert self.p_holds, "released twice"
                assert not any(state != BUFFERED for state, _ in self.writes.values()), "still read"
                self.p_holds = False
            case k.Report(fault):
                assert not self.p_told_off, "reported to an owner who ended it himself"
                self.p_reports.append(fault)

    def step_d(self, event: k.Event) -> None:
        if self.d is None or self.d.state is DecodeState.OVER:
            return
        self.d, actions = step_decode(self.d, event, self.now)
        for action in actions:
            self.act_d(action)

    def act_d(self, action: k.Action) -> None:
        match action:
            case k.SendGranted():
                self.send_p(k.PeerGranted(self.cached, self.blocks - self.cached))
            case k.SendQueued():
                self.send_p(k.PeerQueued(TIMING.lease_s))
            case k.SendVerified():
                self.send_p(k.PeerVerified())
            case k.SendAbort(fault):
                self.send_p(k.PeerAborted(fault))
            case k.Check(part):
                self.checks.append(part)
            case k.StartFence():
                self.d_fence = True
            case k.Quarantine():
                assert self.d_blocks == "granted"
                self.d_blocks = "quarantined"
            case k.Lift():
                assert self.d_blocks == "quarantined"
                self.d_blocks = "free"
            case k.Release():
                assert self.d_blocks == "granted"
                self.d_blocks = "free"
            case k.Report(None):
                assert self.d_blocks == "granted"
                self.d_blocks = "ready"
                self.d_reports.append(None)
                self.check_bytes()
            case k.Report(fault):
                assert not self.d_told_off
                self.d_reports.append(fault)

    def check_bytes(self) -> None:
        """A hand-off that becomes ready has every byte of every block, undamaged, exactly once."""
        assert not self.damaged
        assert not self.writes, "ready while a write may still land"
        want = {(b, layer) for b in range(self.cached, self.blocks) for layer in range(LAYERS)}
        have = [
            (b, layer)
            for push in self.landed
            for b in range(push.first_block, push.first_block + push.num_blocks)
            for layer in range(push.first_layer, push.first_layer + push.num_layers)
        ]
        assert sorted(have) == sorted(want)

    def send_p(self, event: k.Event) -> None:
        if self.linked:
            self.to_p.append(event)

    def send_d(self, event: k.Event) -> None:
        if self.linked:
            self.to_d.append(event)

    def break_link(self) -> None:
        self.linked = False
        self.to_p.clear()
        self.to_d.clear()

    # What may happen next, when nothing goes wrong.

    def natural(self) -> list[Callable[[], None]]:
        """Each is the next event of one actor."""
        found: list[tuple[object, Callable[[], None]]] = [
            (self.p and self.computed < self.tokens, self.compute),
            (self.p and self.computed == self.tokens and not self.seeded, self.seed),
            (self.d and self.d.state is DecodeState.WAITING and self.linked, self.find_room),
            (self.to_p, lambda: self.step_p(self.to_p.popleft())),
            (self.to_d, lambda: self.step_d(self.to_d.popleft())),
            (self.notices, lambda: self.step_d(self.notices.popleft())),
            (self.checks, self.digest),
            (self.endings, lambda: self.step_p(self.endings.popleft())),
            (self.p_fence, lambda: self.answer_p(True)),
            (self.d_fence, lambda: self.answer_d(True)),
        ]
        found.extend((True, partial(self.land, part)) for part in sorted(self.writes))
        return [action for enabled, action in found if enabled]

    def compute(self) -> None:
        self.computed = min(self.tokens, self.computed + 7)
        for layer in range(0, LAYERS, 2):
            self.step_p(k.Computed(self.computed, layer, 2))

    def seed(self) -> None:
        self.seeded = True
        self.step_p(k.Seeded())

    def find_room(self) -> None:
        self.d_blocks = "granted"
        self.step_d(k.RoomFound(self.cached))

    def digest(self) -> None:
        part = self.checks.popleft()
        self.step_d(k.PartChecked(part, part not in self.damaged))

    def land(self, part: int) -> None:
        """The bytes of a write arrive. Of a cancelled one they may, too, and then nobody says so."""
        state, push = self.writes.pop(part)
        if state != BUFFERED:
            assert self.p_holds, "read from blocks that were given back"
        assert self.d is None or self.d_blocks in ("granted", "quarantined"), "written into others' blocks"
        if state != LIVE:
            return
        self.landed.append(push)
        self.endings.append(k.WriteEnded(part, None))
        self.notices.append(
            k.PartArrived(part, push.first_block, push.num_blocks, push.first_layer, push.num_layers)
        )

    def answer_p(self, ok: bool) -> None:
        self.p_fence = False
        if ok:
            for part, (state, push) in self.writes.items():
                if state == CANCELLED:
                    self.writes[part] = (BUFFERED, push)
        self.step_p(k.FenceEnded(ok))

    def answer_d(self, ok: bool) -> None:
        self.d_fence = False
        if ok:  # of what the writer had cancelled; a live write lives on
            self.writes = {p: w for p, w in self.writes.items() if w[0] == LIVE}
        self.step_d(k.FenceEnded(ok))

    # What goes wrong.

    def message_is_repeated_or_lost(self, choice: int, twice: bool) -> None:
        queues: list[tuple[deque[Any], Any]] = [(self.to_p, self.step_p), (self.to_d, self.step_d)]
        if twice:
            queues.append((self.notices, self.step_d))
        queue, step = queues[choice % len(queues)]
        if queue and twice:
            step(queue[0])
        elif queue:
            queue.popleft()

    def write_goes_wrong(self, choice: int, damaged: bool) -> None:
        live = sorted(part for part, (state, _) in self.writes.items() if state == LIVE)
        if not live:
            return
        part = live[choice % len(live)]
        if damaged:
            self.damaged.add(part)
            self.land(part)
        else:
            self.writes[part] = (CANCELLED, self.writes[part][1])
            self.endings.append(k.WriteEnded(part, k.Fault("transfer", "failed")))

    def fence_does_not_hold_in_time(self) -> None:
        if self.p_fence:
            self.answer_p(False)
        if self.d_fence:
            self.answer_d(False)

    def owner_ends_it(self, side: str, needed: bool) -> None:
        fault = k.Fault("transfer" if needed else k.CANCELLED, "ended")
        if (
            side == "p"
            and self.p is not None
            and self.p.state is not PrefillState.OVER
            and not self.p_reports
        ):
            self.p_told_off = True
            self.step_p(k.Ended(fault))
        if side == "d" and self.d is not None and self.d.state is not DecodeState.OVER and not self.d_reports:
            self.d_told_off = True
            self.step_d(k.Ended(fault))

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        for side, step in (("p", self.step_p), ("d", self.step_d)):
            machine = getattr(self, side)
            if machine is not None and machine.due <= self.now:
                step(k.Tick())

    def process_or_link_breaks(self, luck: int, what: str) -> None:
        lost = k.LinkLost(k.Fault("peer_lost", "the link broke"))
        if what == "cut" and luck == 0:
            self.break_link()
        elif what.startswith("crash") and luck == 0:
            self.crash(what[-1])
        elif what.startswith("seen") and not self.linked:
            (self.step_p if what[-1] == "p" else self.step_d)(lost)
        elif what == "end" and not self.linked:  # each side takes its connection down after the link
            self.gone()

    def crash(self, who: str) -> None:
        self.break_link()
        if who == "p":
            self.p = None
        else:
            self.d = None
            self.checks.clear()
        self.gone()

    def gone(self) -> None:
        self.writes.clear()
        self.notices.clear()
        fault = k.Fault("peer_lost", "gone")
        self.step_p(k.PeerGone(fault))
        self.step_d(k.PeerGone(fault))
        self.endings.clear()
        self.p_fence = self.d_fence = False

    # What always holds.

    def check(self) -> None:
        assert len(self.p_reports) <= 1
        assert len(self.d_reports) <= 1
        if self.p_reports == [None]:
            assert self.d is None or self.d_reports == [None]
        if self.p is not None:
            assert self.p_holds == (self.p.state is not PrefillState.OVER)
        if self.d is not None:
            held = {
                DecodeState.WAITING: {"none"},
                DecodeState.RESERVED: {"granted"},
                DecodeState.FILLING: {"granted"},
                DecodeState.VERIFYING: {"granted"},
                DecodeState.QUARANTINED: {"quarantined"},
                DecodeState.FENCING: {"quarantined"},
                DecodeState.OVER: {"none", "ready", "free"},
            }
            assert self.d_blocks in held[self.d.state]

    def end(self) -> None:
        """Faults stop and owners go on: within the longest deadlines both sides are idle."""
        for _ in range(200):
            self.pass_time(0.25)
            if not self.linked:
                self.gone()
            if self.p is not None and self.p.state is not PrefillState.OVER and not self.seeded:
                while self.computed < self.tokens:
                    self.compute()
                self.seed()
            if self.d is not None and self.d.state is DecodeState.WAITING:
                self.find_room()
            self.settle()
            self.check()
        assert self.p is None or self.p.state is PrefillState.OVER, self.p
        assert self.d is None or self.d.state is DecodeState.OVER, self.d

    def settle(self) -> None:
        """Everything that is on its way arrives."""
        for part in [part for part, (state, _) in self.writes.items() if state == LIVE]:
            self.land(part)
        for queue, step in (
            (self.endings, self.step_p),
            (self.to_p, self.step_p),
            (self.to_d, self.step_d),
            (self.notices, self.step_d),
        ):
            while queue:
                step(queue.popleft())
        while self.checks:
            self.digest()
        if self.p_fence:
            self.answer_p(True)
        if self.d_fence:
            self.answer_d(True)
