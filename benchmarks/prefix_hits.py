"""Prefix-block hit ratios of the Mooncake traces over the size of the cache.

    .venv/bin/python -P benchmarks/prefix_hits.py   # a minute; writes docs/results/prefix_hits.json

For each size the engine's block manager beside a plain LRU: see cluster/planner/prefix_study.py.
"""

from __future__ import annotations

import os
from pathlib import Path

from diphase.benchmarks import harness
from diphase.cluster.load.traces import data_folder, load_trace
from diphase.cluster.planner.prefix_study import lru_hits, prefix_hits

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "prefix_hits.json"
TRACES = ("mooncake-conversation", "mooncake-synthetic")
SIZES = (1_000, 3_000, 10_000, 30_000, 100_000)
"""Blocks of 512 tokens."""


def main() -> None:
    traces = {}
    for name in TRACES:
        records = load_trace(name, data_folder(None, os.environ))
        infinite = prefix_hits(records)
        print(f"{name}: {infinite.blocks:,} blocks; infinite cache {infinite.ratio:.4f}", flush=True)
        sizes = []
        for num_blocks in SIZES:
            managed, plain = prefix_hits(records, num_blocks), lru_hits(records, num_blocks)
            print(
                f"{num_blocks:9,} blocks: block manager {managed.ratio:.4f}, plain LRU {plain.ratio:.4f}",
                flush=True,
            )
            sizes.append(
                {
                    "num_blocks": num_blocks,
                    "block_manager": {"hits": managed.hits, "ratio": round(managed.ratio, 4)},
                    "plain_lru": {"hits": plain.hits, "ratio": round(plain.ratio, 4)},
                }
            )
        traces[name] = {
            "requests": len(records),
            "blocks": infinite.blocks,
            "infinite": {"hits": infinite.hits, "ratio": round(infinite.ratio, 4)},
            "sizes": sizes,
        }
    harness.write_result(RESULTS, {"traces": traces})


if __name__ == "__main__":
    main()
