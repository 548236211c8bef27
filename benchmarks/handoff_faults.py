"""How soon a fault in each state of a hand-off is noticed, its blocks are back, and its client goes on.

    .venv/bin/python -P benchmarks/handoff_faults.py   # about ten minutes, as root; writes
                                                       # docs/results/handoff_faults.json and README's table

The cells of tests/integration/test_handoff_faults.py, with the default deadlines: two prefill and two decode
worker processes on a tiny model; those of one pair are killed, stopped (until the others are idle) or cut off
from each other in each state, over tcp between network namespaces and over shm. From the blow on: when the
healthy side gives the hand-off up, when it is over there and its blocks are back, and when the client has its
next token."""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from diphase.benchmarks import harness
from diphase.engine.host_config import HostConfig
from diphase.kv_transfer.config import KvTransferConfig
from diphase.router.config import RouterConfig
from diphase.tests.integration import fault_cells as cells
from diphase.tests.integration.fault_cells import Played
from diphase.tests.integration.fault_cluster import D0, P0, TRANSFER, FaultCluster, fault_cluster
from diphase.tests.integration.fault_network import fault_network

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results" / "handoff_faults.json"
README = ROOT / "README.md"
BEGIN, END = "<!-- hand-off faults -->\n", "<!-- end -->"
MEASURES = ("noticed_s", "over_s", "token_s")
BLOWS = {"prefill killed": (P0, "kill"), "prefill stopped": (P0, "stop"),
         "decode killed": (D0, "kill"), "decode stopped": (D0, "stop")}  # fmt: skip
OUTAGES = {"control link down 3 s": "control", "KV link down 3 s": "kv", "both down 3 s": "both"}
STATES = {
    "reserving": "reserving; decode has not heard of it",
    "held": "held; waiting for room",
    "reserved": "– ; reserved, nothing came",
    "sending": "sending; filling",
    "sent": "sent; verifying",
    "quarantined": "stopped; quarantined",
    "fencing": "settling; fencing (the client left)",
}
"""What each hold is called in the table: the prefill side's state; the decode side's."""
ON_SHM = ("reserving", "held", "reserved", "sending", "quarantined")
CUT = ("held", "sending", "sent")


def outcome(played: Played) -> str:
    if played.hit.cancelled:
        return "cancelled"
    if played.hit.error is not None:
        return f"failed: {played.hit.error.code}"
    return "goes on" if played.hit.attempts == 1 else "again"


async def measure(
    cluster: FaultCluster, rounds: int, cell: dict[str, str], play: Callable[[], Awaitable[Played]]
) -> dict[str, Any]:
    """One cell, `rounds` times."""
    runs = []
    for _ in range(rounds):
        runs.append(await play())
        await cluster.mend()
    found: dict[str, Any] = {**cell, "outcome": sorted({outcome(run) for run in runs})}
    for name in MEASURES:
        seen = [value for run in runs if (value := getattr(run, name)) is not None]
        if seen:
            found[name] = {"median": round(statistics.median(seen), 3), "worst": round(max(seen), 3)}
    print(found, flush=True)
    return found


async def sweep(transport: str, rounds: int, folder: Path) -> list[dict[str, Any]]:
    """Every cell of a transport."""
    found = []
    defaults = KvTransferConfig()
    deadlines = {name: getattr(defaults, name) for name in TRANSFER if name.endswith("_s")}
    with ExitStack() as stack:
        network = stack.enter_context(fault_network()) if transport == "tcp" else None
        async with fault_cluster(
            folder / f"{transport}.log",
            network,
            heartbeat_s=HostConfig().heartbeat_s,
            hang_after_s=RouterConfig().hang_after_s,
            transport=transport,
            **deadlines,
        ) as cluster:
            plays: list[tuple[str, str, Callable[[], Awaitable[Played]]]] = []
            for state in cells.HOLDS if network else ON_SHM:
                for fault, (victim, blow) in BLOWS.items():
                    plays.append((state, fault, partial(cells.play, cluster, state, victim, blow)))
            for state in CUT if network else ():
                for fault, links in OUTAGES.items():
                    plays.append((state, fault, partial(cells.outage, cluster, state, links)))
            for state, fault, play in plays:
                cell = {"transport": transport, "state": state, "fault": fault}
                found.append(await measure(cluster, rounds, cell, play))
    return found


def summary(found: list[dict[str, Any]]) -> dict[str, float]:
    """What the marks are about: the worst of all cells."""

    def worst(name: str, ending: str) -> float:
        return max(
            float(cell[name]["worst"]) for cell in found if cell["fault"].endswith(ending) and name in cell
        )

    return {
        "death_noticed_s": worst("noticed_s", "killed"),
        "hang_noticed_s": worst("noticed_s", "stopped"),
        "token_after_death_s": worst("token_s", "killed"),
        "token_after_hang_s": worst("token_s", "stopped"),
    }


def table(result: dict[str, Any]) -> str:
    """Of README."""
    by_cell = {(cell["transport"], cell["state"], cell["fault"]): cell for cell in result["cells"]}
    lines = []
    for columns, states in ((BLOWS, tuple(STATES)), (OUTAGES, CUT)):
        lines += [f"| state: prefill; decode | {' | '.join(columns)} |", "| --- |" + " --- |" * len(columns)]
        for state in states:
            shown = [_shown(by_cell, state, fault) for fault in columns]
            lines.append(f"| {STATES[state]} | {' | '.join(shown)} |")
        lines.append("")
    return "\n".join(lines)


def _shown(by_cell: dict[tuple[str, str, str], dict[str, Any]], state: str, fault: str) -> str:
    cell = by_cell["tcp", state, fault]
    times = " / ".join(f"{cell[name]['median']:.2f}" if name in cell else "–" for name in MEASURES)
    return (
        times if cell["outcome"] in (["again"], ["cancelled"]) else f"{times} ({', '.join(cell['outcome'])})"
    )


def write_table(result: dict[str, Any]) -> None:
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    README.write_text(f"{before}{BEGIN}{table(result)}{END}{after}", encoding="utf-8")


async def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = [
            cell for transport in ("tcp", "shm") for cell in await sweep(transport, args.rounds, Path(folder))
        ]
    harness.write_result(args.output, {"seconds_after": "the blow", "worst": summary(found), "cells": found})
    if args.output == RESULTS:
        write_table(json.loads(RESULTS.read_text(encoding="utf-8")))


if __name__ == "__main__":
    harness.run(main())
