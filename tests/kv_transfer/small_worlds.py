"""Small worlds, in each of which only some things go wrong: what the guards of the machines are tried in.

Cheapest first. Each is explored to its last state, or to the last history of so many moves.
"""

from __future__ import annotations

from .handoff_parts import Scenario

ANY = {"message": 1, "write": 1, "fence": 1, "late": 1, "owner": 1, "total": 1}
LIES = {"grant": 1, "part": 1, "count": 1, "twice": 1, "total": 1}

WORLDS = {
    world.name: world
    for world in (
        Scenario(name="alone", prompt=True, faults={"time": 0}),
        Scenario(name="recompute", recompute=True, prompt=True, faults={"time": 0}),
        Scenario(name="crash", faults={"crash": 1}),
        Scenario(name="layers", moves=16, layerwise=True, layers=2, prompt=True, faults={"time": 1}),
        Scenario(name="write, fence", faults={"write": 1, "fence": 1}),
        Scenario(name="two", requests=(2, 2), prompt=True, faults={"time": 0}),
        Scenario(name="stale", pairs=(2, 1), moves=7, max_attempts=2, faults={"owner": 1}),
        Scenario(name="message", faults={"message": 1}),
        Scenario(name="prompt", prompt=True, faults={"time": 8, "early": 1}),
        Scenario(name="owner", faults={"owner": 1}),
        Scenario(name="late, steps", steps=2, moves=9, faults={"late": 1}),
        Scenario(name="owner, fence", faults={"owner": 1, "fence": 1}),
        Scenario(name="steps", steps=2, layers=2, moves=16, prompt=True, faults={"time": 5}),
        Scenario(name="age", faults={"age": 1}),
        Scenario(name="late", faults={"late": 1}),
        Scenario(name="write, late", moves=14, faults={"write": 1, "late": 1}),
        Scenario(name="retry", faults={"owner": 1}, max_attempts=2),
        Scenario(name="lies", faults=LIES),
        Scenario(name="count, parts", moves=12, faults={"count": 1}, max_push_runs=1),
        Scenario(name="two, prompt", requests=(2, 2), prompt=True, faults={"time": 6}),
        Scenario(name="owner, message", faults={"owner": 1, "message": 1}),
        Scenario(name="two, crash", requests=(2, 2), faults={"crash": 1}),
    )
}

LARGE = (Scenario(name="two, any", requests=(2, 2), faults=ANY),)
"""Too large for every run of the tests: benchmarks/protocol_states.py explores them."""

FLOORS = {
    "recompute": 20,
    "alone": 71,
    "crash": 970,
    "layers": 910,
    "write, fence": 1_100,
    "two": 1_200,
    "stale": 1_000,
    "message": 2_100,
    "prompt": 2_800,
    "owner": 2_100,
    "late, steps": 2_500,
    "owner, fence": 3_300,
    "steps": 3_400,
    "age": 350,
    "late": 6_600,
    "write, late": 14_000,
    "retry": 10_000,
    "lies": 10_000,
    "count, parts": 13_000,
    "two, prompt": 17_000,
    "owner, message": 18_000,
    "two, crash": 40_000,
}
"""States that each of WORLDS has at the least: fewer, and something no longer happens in it."""
