"""What disaggregation adds to one request: token 0's way to the client, and the hand-off before token 1.

    .venv/bin/python -P benchmarks/handoff.py            # about two minutes; writes docs/results/handoff.json

For each transport a cluster of one prefill and one decode worker, a core each, serves lone requests of 512
prompt tokens that nobody has cached. The stages are the server's own, measured for each request.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from diphase.benchmarks import harness
from diphase.cluster.generate import stream
from diphase.cluster.load.served import serving
from diphase.proto import inference_pb2 as pb

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "handoff.json"
PROMPT_TOKENS = 512
WARM_UP = 3
VOCABULARY = 49_152


async def one(address: str, rng: random.Random) -> tuple[pb.Stages, float]:
    """A request's stages, and token 1's delay after token 0 as the client sees it, ms."""
    prompt = [rng.randrange(16, VOCABULARY) for _ in range(PROMPT_TOKENS)]
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=prompt), sampling=pb.Sampling(max_tokens=4, ignore_eos=True)
    )
    arrivals: list[float] = []
    stages = pb.Stages()
    async for response in stream(address, "", request):
        arrivals.extend([time.perf_counter()] * len(response.token_ids))
        stages = response.stages
    return stages, (arrivals[1] - arrivals[0]) * 1000.0


async def measure(transport: str, count: int, log: Path) -> dict[str, Any]:
    cores = sorted(os.sched_getaffinity(0))
    settings = [
        f"kv_transfer.transport={transport}",
        "router.local_prefill_tokens=0",
        f"pools.prefill.cores=[{cores[0]}]",
        f"pools.decode.cores=[{cores[-1]}]",
    ]
    rng = random.Random(0)
    async with serving(settings, log) as address:
        runs = [await one(address, rng) for _ in range(WARM_UP + count)][WARM_UP:]
    stages = [run[0] for run in runs]

    def median(values: list[float]) -> float:
        return round(statistics.median(values), 2)

    return {
        "requests": count,
        "delivery_of_token_0_ms": median([s.delivery_ms for s in stages]),
        "handoff_ms": median([s.handoff_ms for s in stages]),
        "decode_queue_ms": median([s.decode_queue_ms for s in stages]),
        "first_decode_ms": median([s.first_decode_ms for s in stages]),
        "token_1_after_token_0_ms": median([run[1] for run in runs]),
        "prefill_ms": median([s.prefill_ms for s in stages]),
        "ttft_ms": median([s.ttft_ms for s in stages]),
        "kv_bytes": stages[0].handoff_bytes,
    }


async def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=20)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for transport in ("shm", "tcp"):
            found[transport] = await measure(transport, args.requests, Path(folder) / "serve.log")
            print(transport, found[transport])
    harness.write_result(args.output, {"prompt_tokens": PROMPT_TOKENS, "medians": found})


if __name__ == "__main__":
    harness.run(main())
