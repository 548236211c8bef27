"""Several prefill and decode processes, requests and attempts at random: the invariants of docs/handoff.md
hold after every step, and when faults stop everything becomes idle.

Messages are delayed, repeated and lost, writes fail or are damaged or land late, fences do not hold, links
break, processes crash and come back under the same address, clients go, engines fail, deadlines pass.
What small worlds can do is explored to the last state in test_every_interleaving.py.
"""

from __future__ import annotations

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from .handoff_invariants import check, drain
from .handoff_parts import Scenario
from .routed_world import RoutedWorld

NUMBERS = st.integers(0, 2**20)
FAULTS = ("crash", "message", "write", "fence", "late", "owner")


def big_world(layers: int, steps: int, decode_blocks: int, faults: int) -> RoutedWorld:
    """Two prefill and two decode processes, four requests that do not all fit."""
    return RoutedWorld(
        Scenario(
            name="big",
            requests=(1, 3, 2, 3),
            steps=steps,
            layers=layers,
            layerwise=layers > 1,
            max_push_runs=2,
            decode_blocks=decode_blocks,
            max_attempts=3,
            pairs=(2, 2),
            faults=dict.fromkeys(FAULTS, faults),
        )
    )


def go_on(world: RoutedWorld, choice: int) -> None:
    """One thing that may happen next when nothing goes wrong, if there is any."""
    possible = list(world.moves())
    if possible:
        world.make(possible[choice % len(possible)])


def go_wrong(world: RoutedWorld, choice: int) -> None:
    """One fault of a kind that is possible now."""
    possible = list(world.faults())
    kinds = sorted({move[1] for move in possible})
    if kinds:
        kind = kinds[choice % len(kinds)]
        of_kind = [move for move in possible if move[1] == kind]
        world.make(of_kind[choice // len(kinds) % len(of_kind)])


class HandoffMachine(RuleBasedStateMachine):
    """Hypothesis looks for a short history that breaks an invariant."""

    world: RoutedWorld | None = None

    @initialize(layers=st.integers(1, 2), steps=st.integers(1, 3), decode_blocks=st.integers(3, 7))
    def begin(self, layers: int, steps: int, decode_blocks: int) -> None:
        self.world = big_world(layers, steps, decode_blocks, faults=50)

    @rule(choices=st.lists(NUMBERS, min_size=1, max_size=12))
    def things_go_on(self, choices: list[int]) -> None:
        assert self.world is not None
        for choice in choices:
            go_on(self.world, choice)
            check(self.world)

    @rule(choice=NUMBERS)
    def something_goes_wrong(self, choice: int) -> None:
        assert self.world is not None
        go_wrong(self.world, choice)

    @invariant()
    def all_is_well(self) -> None:
        if self.world is not None:
            check(self.world)
            self.world.check_clients()

    def teardown(self) -> None:
        if self.world is not None:
            drain(self.world, set())


SETTINGS = settings(max_examples=60, stateful_step_count=30, deadline=None, derandomize=True)


async def test_no_history_that_hypothesis_finds_breaks_an_invariant() -> None:
    """Inside of an event loop, which the dispatcher sets its timers on; none fires."""
    run_state_machine_as_test(HandoffMachine, settings=SETTINGS)


@pytest.mark.parametrize("share", [0.0, 0.03, 0.1])
async def test_random_histories_break_nothing(share: float) -> None:
    done = requests = 0
    for seed in range(80):
        rng = random.Random(f"{share}-{seed}")
        world = big_world(rng.randint(1, 2), rng.randint(1, 3), rng.randint(3, 7), faults=50)
        for _ in range(150):
            (go_wrong if rng.random() < share else go_on)(world, rng.getrandbits(20))
            check(world)
            world.check_clients()
        drain(world, set())
        done += sum(request.outcome == "done" for request in world.requests)
        requests += len(world.requests)
    assert done == requests if share == 0.0 else 0 < done < requests
