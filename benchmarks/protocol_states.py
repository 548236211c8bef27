"""How many states the hand-off has in small worlds, every one of which keeps the invariants.

    .venv/bin/python -P benchmarks/protocol_states.py   # minutes; writes docs/results/protocol_states.json

Each world is explored breadth first to its last state. A violation ends the run with a shortest history.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from diphase.benchmarks import harness
from diphase.tests.kv_transfer.exploration import explore
from diphase.tests.kv_transfer.guards import EQUIVALENT, kept
from diphase.tests.kv_transfer.small_worlds import LARGE, WORLDS

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "protocol_states.json"


def main() -> None:
    worlds = []
    for world in (*WORLDS.values(), *LARGE):
        started = time.perf_counter()
        found = explore(world)
        if found.violation:
            sys.exit("\n".join([f"{world.name}: {found.violation}", *map(str, found.history)]))
        seconds = time.perf_counter() - started
        print(
            f"{world.name:16} {found.states:9,} states {found.transitions:10,} transitions "
            f"{found.at_rest:6,} at rest {seconds:7.1f} s",
            flush=True,
        )
        worlds.append(
            {
                "world": world.name,
                "requests": list(world.requests),
                "decode_blocks": world.decode_blocks,
                "faults": world.faults,
                "longest_history": found.moves,
                "states": found.states,
                "transitions": found.transitions,
                "states_at_rest": found.at_rest,
                "seconds": round(seconds, 1),
            }
        )
    guards = {"caught": len(kept()), "equivalent": len(EQUIVALENT)}
    harness.write_result(RESULTS, {"guards": guards, "worlds": worlds})


if __name__ == "__main__":
    main()
