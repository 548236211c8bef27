"""How much of a hand-off hides behind the computing of its prompt.

    .venv/bin/python -P benchmarks/overlap.py       # about ten minutes; writes docs/results/overlap.json

A prefill and a decode worker, a core each, serve lone requests that nobody has cached, in three
arrangements by turns: as configured (prompts of 1,024 tokens and more are pushed layer by layer), with
whole pushes only, and with whole prompts in one chunk pushed at their end, which is the transfer alone.
From the trace of each request:

- alone: from the KV of the last layer to the last part verified, when all of it is sent then;
- tail: the same when layers left as they were computed. The rest of the last layer, the head and the first
  token are computed meanwhile;
- exposed: what is left of the hand-off when nothing is computed any more, from the first token to the
  hand-off's end at the decode worker; hidden = 1 - exposed / alone, hidden_from_last_kv = 1 - tail / alone;
- prefill: what the pushes cost the prompt, as a ratio of its time with them to that without.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diphase.benchmarks import harness
from diphase.cluster.endpoint import StatusClient
from diphase.cluster.generate import stream
from diphase.cluster.load.served import serving
from diphase.proto import inference_pb2 as pb
from diphase.proto.cluster_pb2 import GetTraceResponse

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "overlap.json"
LENGTHS = (256, 512, 1024, 2048, 4096)
VOCABULARY = 49_152
TRIES = 5
"""Of asking for a trace: one leaves out workers that do not answer within a second."""
WHOLE = "kv_transfer.layerwise_tokens=1000000"
ARRANGEMENTS: dict[str, tuple[str, ...]] = {
    "layered": (),
    "whole": (WHOLE,),
    "alone": (WHOLE, "pools.prefill.chunk_budget=8192"),
}


@dataclass(frozen=True)
class Times:
    """Of one request, ms."""

    prefill: float
    tail: float
    exposed: float


def times(trace: GetTraceResponse) -> Times:
    [prefill] = [e for e in trace.events if e.name == "prefill"]
    verified = max(e.end_s for e in trace.events if e.name == "verify")
    computed = [e for e in trace.events if e.name == "computed"]
    num_layers = max(ends_at(e.detail) for e in computed)
    there = max(e.begin_s for e in computed if ends_at(e.detail) == num_layers)
    [token] = [e.begin_s for e in trace.events if e.name == "seeded"]
    over = max(verified, *(e.begin_s for e in trace.events if e.name == "peer completed"))
    return Times(
        prefill=(prefill.end_s - prefill.begin_s) * 1e3,
        tail=(verified - there) * 1e3,
        exposed=(over - token) * 1e3,
    )


def ends_at(detail: str) -> int:
    """The layer that a `computed` event reaches."""
    fields = dict(word.split("=") for word in detail.split())
    return int(fields["first_layer"]) + int(fields["num_layers"])


async def one(address: str, client: StatusClient, length: int, rng: random.Random) -> Times:
    prompt = [rng.randrange(16, VOCABULARY) for _ in range(length)]
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=prompt), sampling=pb.Sampling(max_tokens=3, ignore_eos=True)
    )
    last = pb.GenerateResponse()
    async for response in stream(address, "", request):
        last = response
    for _ in range(TRIES):
        trace = await client.trace(address, last.request_id, 5.0)
        if {"computed", "verify"} <= {event.name for event in trace.events}:
            return times(trace)
    raise SystemExit("a worker did not tell what it knows of a request")


async def measure(transport: str, rounds: int, folder: Path) -> list[dict[str, Any]]:
    """All three arrangements are up at once and idle by turns, so that they see the same machine."""
    cores = sorted(os.sched_getaffinity(0))
    common = [
        f"kv_transfer.transport={transport}",
        "router.local_prefill_tokens=0",
        f"pools.prefill.cores=[{cores[0]}]",
        f"pools.decode.cores=[{cores[-1]}]",
    ]
    rng = random.Random(0)
    client = StatusClient("")
    rows = []
    async with AsyncExitStack() as stack:
        stack.push_async_callback(client.close)
        addresses = {
            name: await stack.enter_async_context(serving([*common, *more], folder / f"{name}.log"))
            for name, more in ARRANGEMENTS.items()
        }
        for length in LENGTHS:
            samples: dict[str, list[Times]] = {name: [] for name in addresses}
            for number in range(rounds + 1):
                for name, address in addresses.items():
                    sample = await one(address, client, length, rng)
                    if number:  # the first warms up
                        samples[name].append(sample)
            rows.append(row(length, samples))
            print(transport, rows[-1], flush=True)
    return rows


def row(length: int, samples: dict[str, list[Times]]) -> dict[str, Any]:
    prefill = {name: statistics.median(each.prefill for each in found) for name, found in samples.items()}
    tail = {name: statistics.median(each.tail for each in found) for name, found in samples.items()}
    exposed = statistics.median(each.exposed for each in samples["layered"])
    return {
        "prompt_tokens": length,
        "alone_ms": round(tail["alone"], 2),
        "tail_ms": round(tail["layered"], 2),
        "tail_whole_pushes_ms": round(tail["whole"], 2),
        "exposed_ms": round(exposed, 2),
        "hidden": round(1.0 - exposed / tail["alone"], 3),
        "hidden_from_last_kv": round(1.0 - tail["layered"] / tail["alone"], 3),
        "prefill_ms": round(prefill["layered"], 1),
        "prefill_to_that_of_whole_pushes": round(prefill["layered"] / prefill["whole"], 3),
    }


async def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = {name: await measure(name, args.rounds, Path(folder)) for name in ("shm", "tcp")}
    harness.write_result(args.output, {"transports": found})


if __name__ == "__main__":
    harness.run(main())
