"""Both machines against each other over an adversarial network: the invariants of docs/handoff.md hold
throughout.

Control messages may be dropped, repeated and delayed against the data plane; a cancelled write may land until
a fence has held; either process may crash, the link may break, time may pass, owners may abort at any moment.
"""

from __future__ import annotations

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from .handoff_world import HandoffWorld

NUMBERS = st.integers(0, 2**20)


def proceed(world: HandoffWorld, choice: int) -> None:
    """One natural event, if any is possible."""
    possible = world.natural()
    if possible:
        possible[choice % len(possible)]()


def go_wrong(world: HandoffWorld, kind: int, choice: int) -> None:
    """One thing that should not happen but does; repeated and lost messages and delays are the commonest."""
    flag = bool(choice & 1)
    choice >>= 1
    match kind % 8:
        case 0 | 1:
            world.message_is_repeated_or_lost(choice, flag)
        case 2:
            world.write_goes_wrong(choice, flag)
        case 3:
            world.fence_does_not_hold_in_time()
        case 4:
            world.owner_ends_it("pd"[choice % 2], flag)
        case 5 | 6:
            world.pass_time([0.1, 0.6, 1.1, 2.1, 5.1, 10.1][choice % 6])
        case 7:
            whats = ["cut", "crash p", "crash d", "seen p", "seen d", "end"]
            world.process_or_link_breaks(choice // 6 % 4, whats[choice % 6])


class HandoffMachine(RuleBasedStateMachine):
    """Hypothesis looks for a short history that breaks an invariant."""

    world: HandoffWorld | None = None

    @initialize(tokens=st.integers(1, 30), layerwise=st.booleans(), cached=st.integers(0, 8))
    def begin(self, tokens: int, layerwise: bool, cached: int) -> None:
        self.world = HandoffWorld(tokens, layerwise, cached)

    @rule(choices=st.lists(NUMBERS, min_size=1, max_size=12))
    def things_go_on(self, choices: list[int]) -> None:
        assert self.world is not None
        for choice in choices:
            proceed(self.world, choice)

    @rule(kind=NUMBERS, choice=NUMBERS)
    def something_goes_wrong(self, kind: int, choice: int) -> None:
        assert self.world is not None
        go_wrong(self.world, kind, choice)

    @invariant()
    def all_is_well(self) -> None:
        if self.world is not None:
            self.world.check()

    def teardown(self) -> None:
        if self.world is not None:
            self.world.end()


HandoffMachine.TestCase.settings = settings(
    max_examples=100, stateful_step_count=30, deadline=None, derandomize=True
)
TestHandoffMachine = HandoffMachine.TestCase


@pytest.mark.parametrize("faults", [0.0, 0.05, 0.2])
def test_a_thousand_random_histories_break_nothing(faults: float) -> None:
    ready = 0
    for seed in range(1000):
        rng = random.Random(f"{faults}-{seed}")
        world = HandoffWorld(rng.randint(1, 30), rng.random() < 0.5, rng.randint(0, 8))
        for _ in range(60):
            if rng.random() < faults:
                go_wrong(world, rng.getrandbits(20), rng.getrandbits(20))
            else:
                proceed(world, rng.getrandbits(20))
            world.check()
        world.end()
        ready += world.d_reports == [None]
    assert ready == 1000 if faults == 0.0 else 0 < ready < 1000
