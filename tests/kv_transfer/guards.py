"""Which small world shows what each guard of the machines is for.

    .venv/bin/python -P -m diphase.tests.kv_transfer.guards    # finds it anew, in minutes; writes guards.json

guards.json: the mutant of mutants.py without the guard -> the name of the first small world (small_worlds.py)
in which an invariant breaks. EQUIVALENT: mutants that break none, with the reason.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from .exploration import Explored, explore
from .mutants import Mutant, mutants
from .small_worlds import WORLDS

TABLE = Path(__file__).with_name("guards.json")

WORDS = "it only chooses the words of a fault"
NO_DEADLINE = "no deadline is armed there (an invariant), so that the handler finds nothing to do"
EQUIVALENT = {
    "PREFILL_TABLE: fencing at Tick: tick_sent": NO_DEADLINE,
    "PREFILL_TABLE: over at Tick: tick_sent": NO_DEADLINE,
    "DECODE_TABLE: waiting at PartChecked: checked": "nothing has arrived: the handler refuses it, too",
    "PREFILL_TABLE: sent at Computed: push_computed": "everything is pushed: there is nothing left to push",
    "prefill_side.tick_waiting: `m.state is S.HELD` is False": WORDS,
    "prefill_side.tick_waiting: `m.state is S.HELD` is True": WORDS,
    "decode_side.tick_granted: `now >= m.completed_at + m.timing.tail_timeout_s` is False": WORDS,
    "decode_side.tick_granted: `now >= m.completed_at + m.timing.tail_timeout_s` is True": WORDS,
}


def try_out(mutant: Mutant, world: str) -> Explored:
    """Explores the mutant up to the first violation. Where it fills a cell that refused, the event may come
    once out of nowhere."""
    scenario = replace(WORLDS[world], protocol=mutant.protocol())
    if mutant.stray is not None:
        scenario = replace(scenario, strays=(mutant.stray,), faults={**scenario.faults, "stray": 1})
    return explore(scenario)


def kept() -> dict[str, str]:
    table: dict[str, str] = json.loads(TABLE.read_text(encoding="utf-8"))
    return table


def search() -> None:
    """Writes the table; says which mutants break nothing."""
    table: dict[str, str] = {}
    for mutant in mutants():
        if mutant.name in EQUIVALENT:
            continue
        for world in WORLDS:
            found = try_out(mutant, world)
            if found.violation:
                table[mutant.name] = world
                break
        print(f"{mutant.line:4} {mutant.name}: {table.get(mutant.name, 'NOTHING BREAKS')}", flush=True)
    TABLE.write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    search()
