"""Prefix-block hit ratios of the Mooncake traces over the size of the cache.

    .venv/bin/python -P benchmarks/prefix_hits.py   # seconds; writes docs/results/prefix_hits.json

For each size the engine's block manager beside a plain LRU, and the manager where only full blocks are
shared, as the engine does: see cluster/planner/prefix_study.py.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from diphase.benchmarks import harness
from diphase.cluster.load.traces import data_folder, load_trace
from diphase.cluster.planner.prefix_study import PrefixHits, lru_hits, prefix_hits

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "prefix_hits.json"
TRACES = ("mooncake-conversation", "mooncake-synthetic")
SIZES = (1_000, 3_000, 10_000, 30_000, 100_000)
"""Blocks of 512 tokens."""


def main() -> None:
    traces = {}
    for name in TRACES:
        records = load_trace(name, data_folder(None, os.environ))
        print(f"{name}: {'blocks':>9} {'manager':>8} {'plain LRU':>10} {'full blocks':>12}")
        sizes = []
        for num_blocks in (*SIZES, None):
            managed = prefix_hits(records, num_blocks)
            # Without evictions their order is nothing.
            plain = lru_hits(records, num_blocks or managed.blocks)
            full = prefix_hits(records, num_blocks, full_only=True)
            shown = f"{num_blocks:,}" if num_blocks else "no limit"
            print(
                f"{shown:>{len(name) + 11}} {managed.ratio:8.4f} {plain.ratio:10.4f} {full.ratio:12.4f}",
                flush=True,
            )
            sizes.append(
                {
                    "num_blocks": num_blocks,
                    "block_manager": content(managed),
                    "plain_lru": content(plain),
                    "block_manager_full_only": content(full),
                }
            )
        traces[name] = {"requests": len(records), "blocks": managed.blocks, "sizes": sizes}
    harness.write_result(RESULTS, {"traces": traces})


def content(found: PrefixHits) -> dict[str, Any]:
    return {"hits": found.hits, "ratio": round(found.ratio, 4)}


if __name__ == "__main__":
    main()
