"""Every interleaving of a small world: breadth first, so that a violation comes with a shortest history."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .handoff_drivers import Frozen, Move
from .handoff_faults import FaultyWorld
from .handoff_invariants import check, drain, next_deadline, pass_time
from .handoff_parts import Scenario


@dataclass
class Explored:
    """What was found."""

    states: int = 0
    transitions: int = 0
    moves: int = 0
    """Of the longest of the shortest histories."""
    at_rest: int = 0
    """States in which nothing moves by itself: from each the world was run until it was idle."""
    violation: str = ""
    history: list[Move] = field(default_factory=list)
    """The shortest that leads to the violation."""


def explore(scenario: Scenario, limit: int = 5_000_000) -> Explored:
    """All states within the scenario's bounds, or those up to the first violation.

    Raises:
        RuntimeError: there are more than `limit` states.
    """
    return Exploration(scenario, limit).run()


class Exploration:
    def __init__(self, scenario: Scenario, limit: int) -> None:
        self.limit = limit
        self.world = FaultyWorld(scenario)
        self.prompt = scenario.prompt
        self.found = Explored()
        self.parents: dict[Frozen, tuple[Frozen | None, Move]] = {}
        self.same: dict[Any, Any] = {}
        self.first: dict[Frozen, Frozen] = {}
        """State -> the one after the first of the moves that need no fault."""
        self.ends: set[Any] = set()
        """States at rest that are known to become idle."""

    def run(self) -> Explored:
        start = self.compact(self.world.freeze())
        self.parents[start] = (None, ())
        frontier = [start]
        for _ in range(self.world.scenario.moves):
            if not frontier:
                break
            following: list[Frozen] = []
            for state in frontier:
                if not self.expand(state, following):
                    self.found.states = len(self.parents)
                    return self.found
            if len(self.parents) > self.limit:
                raise RuntimeError(f"more than {self.limit} states")
            frontier = following
            self.found.moves += bool(following)
        self.found.states = len(self.parents)
        self.look_for_cycle()
        return self.found

    def look_for_cycle(self) -> None:
        """From no state things may go round for ever without a fault or a deadline."""
        settled: set[Frozen] = set()
        for state in self.first:
            path: dict[Frozen, None] = {}
            at: Frozen | None = state
            while at is not None and at not in settled and at not in path:
                path[at] = None
                at = self.first.get(at)
            if at in path:
                self.found.violation = "Violation: 4: it never comes to rest"
                self.found.history = self.history(at)
                return
            settled.update(path)

    def expand(self, state: Frozen, following: list[Frozen]) -> bool:
        """Adds what is new after one more move; False at a violation."""
        world = self.world.thaw(state)
        natural = list(world.moves())
        waiting = not natural
        if self.prompt and world.budget["time"] and len(natural) == len(list(world.slow_moves())):
            natural.append(("wait",))
        try:
            if waiting:
                self.found.at_rest += 1
                move: Move = ("drain",)
                drain(self.world.thaw(state), self.ends)
            for move in (*natural, *world.faults()):
                self.found.transitions += 1
                after = self.world.thaw(state)
                if move[0] == "wait":
                    after.budget["time"] -= 1
                    pass_time(after, next_deadline(after))
                else:
                    after.make(move)
                check(after)
                new = self.compact(after.freeze())
                if natural and move is natural[0] and move[0] != "wait":
                    self.first[state] = new
                if new not in self.parents:
                    self.parents[new] = (state, move)
                    following.append(new)
        except Exception as error:
            self.found.violation = f"{type(error).__name__}: {error}"
            self.found.history = [*self.history(state), move]
            return False
        return True

    def compact(self, state: Frozen) -> Frozen:
        """Parts that occurred before are the same object: a state costs little more than its references."""
        same = self.same.setdefault
        return tuple(same(part, part) for part in state)

    def history(self, state: Frozen | None) -> list[Move]:
        moves: list[Move] = []
        while state is not None:
            state, move = self.parents[state]
            moves.append(move)
        return moves[-2::-1]
