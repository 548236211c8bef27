"""README's table of faults is the one that the benchmark makes of its result."""

from __future__ import annotations

import json
from typing import Any

from diphase.benchmarks import handoff_faults
from diphase.benchmarks.handoff_faults import BEGIN, BLOWS, CUT, END, OUTAGES, README, RESULTS, STATES


def result() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))
    return found


def test_readme_shows_the_result_that_is_kept() -> None:
    _, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    assert rest.partition(END)[0] == handoff_faults.table(result())


def test_every_cell_was_measured_and_recovered_without_an_operator() -> None:
    cells = {(cell["transport"], cell["state"], cell["fault"]): cell for cell in result()["cells"]}
    wanted = [(state, fault) for state in STATES for fault in BLOWS]
    wanted += [(state, fault) for state in CUT for fault in OUTAGES]
    assert all(set(cells["tcp", *cell]["outcome"]) <= {"again", "goes on", "cancelled"} for cell in wanted)
