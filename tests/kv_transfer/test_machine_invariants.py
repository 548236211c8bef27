"""Both machines against each other over an adversarial network: the invariants of docs/handoff.md hold
throughout.

Control messages may be dropped, repeated and delayed against the data plane; a cancelled write may land until
a fence has held; either process may crash, the link may break, time may pass, owners may abort at any moment.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from diphase.kv_transfer import machine as k
from diphase.kv_transfer.decode_side import Decode, DecodeState, start_decode, step_decode
from diphase.kv_transfer.prefill_side import Prefill, PrefillState, start_prefill, step_prefill
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

TIMING = k.Timing(reserve_timeout_s=5.0, lease_s=30.0, progress_timeout_s=2.0, tail_timeout_s=10.0)
LAYERS = 4
BLOCK = 4
LIVE, CANCELLED, BUFFERED = "live", "cancelled", "buffered"


class HandoffMachine(RuleBasedStateMachine):
    """One hand-off between a prefill process `p` and a decode process `d`."""

    @initialize(tokens=st.integers(1, 30), layerwise=st.booleans(), cached=st.integers(0, 8))
    def begin(self, tokens: int, layerwise: bool, cached: int) -> None:
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

    # What the owners do.

    @precondition(lambda self: self.p is not None and self.computed < self.tokens)
    @rule(chunk=st.integers(1, 16))
    def compute(self, chunk: int) -> None:
        self.computed = min(self.tokens, self.computed + chunk)
        for layer in range(0, LAYERS, 2):
            self.step_p(k.Computed(self.computed, layer, 2))

    @precondition(lambda self: self.p is not None and self.computed == self.tokens and not self.seeded)
    @rule()
    def seed(self) -> None:
        self.seeded = True
        self.step_p(k.Seeded())

    @rule(needed=st.booleans())
    def end_prefill(self, needed: bool) -> None:
        if self.p is not None and self.p.state is not PrefillState.OVER and not self.p_reports:
            self.p_told_off = True
            self.step_p(k.Ended(k.Fault("transfer" if needed else k.CANCELLED, "ended")))

    @rule()
    def end_decode(self) -> None:
        if self.d is not None and self.d.state is not DecodeState.OVER and not self.d_reports:
            self.d_told_off = True
            self.step_d(k.Ended(k.Fault(k.CANCELLED, "ended")))

    @precondition(lambda self: self.d is not None and self.d.state is DecodeState.WAITING and self.linked)
    @rule()
    def find_room(self) -> None:
        self.d_blocks = "granted"
        self.step_d(k.RoomFound(self.cached))

    # What the network does.

    @precondition(lambda self: self.to_p)
    @rule(what=st.sampled_from(["deliver", "deliver", "deliver", "repeat", "drop"]))
    def control_to_p(self, what: str) -> None:
        event = self.to_p.popleft()
        for _ in range({"deliver": 1, "repeat": 2, "drop": 0}[what]):
            self.step_p(event)

    @precondition(lambda self: self.to_d)
    @rule(what=st.sampled_from(["deliver", "deliver", "deliver", "repeat", "drop"]))
    def control_to_d(self, what: str) -> None:
        event = self.to_d.popleft()
        for _ in range({"deliver": 1, "repeat": 2, "drop": 0}[what]):
            self.step_d(event)

    @precondition(lambda self: self.writes)
    @rule(data=st.data(), outcome=st.sampled_from(["done", "done", "done", "damaged", "failed"]))
    def write_moves(self, data: Any, outcome: str) -> None:
        """A live write lands, is damaged on the way or fails; a cancelled one lands late, without a
        notice."""
        part = data.draw(st.sampled_from(sorted(self.writes)))
        state, push = self.writes.pop(part)
        if state != BUFFERED:
            assert self.p_holds, "read from blocks that were given back"
        assert self.d is None or self.d_blocks in ("granted", "quarantined"), "written into others' blocks"
        if state != LIVE:
            return
        if outcome == "failed":
            self.writes[part] = (CANCELLED, push)
            self.endings.append(k.WriteEnded(part, k.Fault("transfer", "failed")))
            return
        if outcome == "damaged":
            self.damaged.add(part)
        self.landed.append(push)
        self.endings.append(k.WriteEnded(part, None))
        self.notices.append(
            k.PartArrived(part, push.first_block, push.num_blocks, push.first_layer, push.num_layers)
        )

    @precondition(lambda self: self.notices)
    @rule(twice=st.booleans())
    def notice(self, twice: bool) -> None:
        event = self.notices.popleft()
        for _ in range(1 + twice):
            self.step_d(event)

    @precondition(lambda self: self.checks)
    @rule()
    def digest(self) -> None:
        part = self.checks.popleft()
        self.step_d(k.PartChecked(part, part not in self.damaged))

    @precondition(lambda self: self.endings)
    @rule()
    def write_ends(self) -> None:
        self.step_p(self.endings.popleft())

    @precondition(lambda self: self.p_fence)
    @rule(ok=st.booleans())
    def fence_of_p(self, ok: bool) -> None:
        self.p_fence = False
        if ok:
            for part, (state, push) in self.writes.items():
                if state == CANCELLED:
                    self.writes[part] = (BUFFERED, push)
        self.step_p(k.FenceEnded(ok))

    @precondition(lambda self: self.d_fence)
    @rule(ok=st.booleans())
    def fence_of_d(self, ok: bool) -> None:
        self.d_fence = False
        if ok:  # of what the writer had cancelled; a live write lives on
            self.writes = {p: w for p, w in self.writes.items() if w[0] == LIVE}
        self.step_d(k.FenceEnded(ok))

    @rule(seconds=st.sampled_from([0.1, 0.6, 1.1, 2.1, 5.1, 10.1]))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        for side, step in (("p", self.step_p), ("d", self.step_d)):
            machine = getattr(self, side)
            if machine is not None and machine.due <= self.now:
                step(k.Tick())

    @precondition(lambda self: self.linked)
    @rule()
    def cut(self) -> None:
        self.break_link()

    @precondition(lambda self: not self.linked)
    @rule(side=st.sampled_from("pd"))
    def link_loss_is_seen(self, side: str) -> None:
        (self.step_p if side == "p" else self.step_d)(k.LinkLost(k.Fault("peer_lost", "the link broke")))

    @precondition(lambda self: not self.linked)
    @rule()
    def connection_ends(self) -> None:
        """After the link, each side takes its connection down: nothing moves any more."""
        self.gone()

    @rule(who=st.sampled_from("pd"))
    def crash(self, who: str) -> None:
        if self.p is None or self.d is None:
            return
        self.break_link()
        if who == "p":
            self.p = None
            self.endings.clear()
        else:
            self.d = None
            self.d_fence = False
            self.notices.clear()
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

    @invariant()
    def reports_are_single_and_agree(self) -> None:
        if not hasattr(self, "now"):
            return
        assert len(self.p_reports) <= 1
        assert len(self.d_reports) <= 1
        if self.p_reports == [None]:
            assert self.d is None or self.d_reports == [None]

    @invariant()
    def blocks_are_held_exactly_while_needed(self) -> None:
        if not hasattr(self, "now"):
            return
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

    def teardown(self) -> None:
        """Faults stop and owners go on: within the longest deadlines both sides are idle."""
        if not hasattr(self, "now"):
            return
        for _ in range(200):
            self.pass_time(0.25)
            if not self.linked:
                self.gone()
            if self.p is not None and self.p.state is not PrefillState.OVER and not self.seeded:
                self.compute(self.tokens)
                self.seed()
            if self.d is not None and self.d.state is DecodeState.WAITING:
                self.find_room()
            self.settle()
            self.blocks_are_held_exactly_while_needed()
        assert self.p is None or self.p.state is PrefillState.OVER, self.p
        assert self.d is None or self.d.state is DecodeState.OVER, self.d

    def settle(self) -> None:
        """Everything that is on its way arrives."""
        for part, (state, push) in list(self.writes.items()):
            if state == LIVE:
                del self.writes[part]
                self.landed.append(push)
                self.endings.append(k.WriteEnded(part, None))
                self.notices.append(
                    k.PartArrived(part, push.first_block, push.num_blocks, push.first_layer, push.num_layers)
                )
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
            self.fence_of_p(True)
        if self.d_fence:
            self.fence_of_d(True)


HandoffMachine.TestCase.settings = settings(
    max_examples=250,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
TestHandoffMachine = HandoffMachine.TestCase
