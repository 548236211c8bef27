"""How fast the simulator is, beside one that steps token by token on SimPy.

    .venv/bin/pip install simpy
    .venv/bin/python -P benchmarks/simulator_speed.py   # writes docs/results/simulator_speed.json
    … --distserve FOLDER   # also the simulator that DistServe's authors released, of a checkout of theirs

The whole Mooncake conversation trace on four prefill and four decode workers (blocks of 512 tokens, prefix
caches, hand-offs over links), and workloads of fixed lengths on one prefill and one decode worker. The SimPy
simulator is a bare one: a process for each worker that takes all prompts that wait, or one token for each
sequence, with the same step times; no router, no blocks, no links: less than a simulator can do, and so the
yardstick that is hardest to beat. The one of DistServe's authors, on SimPy too, serves the same arrivals and
lengths with its own step times of OPT-13B; only its event loop is timed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from diphase.benchmarks import harness
from diphase.cluster.load.trace_formats import HASH_BLOCK_TOKENS
from diphase.cluster.load.traces import data_folder, load_trace
from diphase.cluster.load.workload import Arrivals, WorkloadConfig, plan_arrivals
from diphase.cluster.planner.deployment import Deployment, SimulationConfig, WorkerSpec
from diphase.cluster.planner.records import SimResult
from diphase.cluster.planner.sim_request import SimRequest
from diphase.cluster.planner.sim_workload import PublishedWorkload, requests_of
from diphase.cluster.planner.simulator import Simulation
from diphase.cluster.planner.topology import flat_topology
from diphase.decode_workers.config import DecodeSchedulerConfig
from diphase.prefill_workers.config import PrefillSchedulerConfig
from diphase.router.config import RouterConfig
from diphase.router.latency_model import Coefficients
from diphase.router.step_time import StepShape

STEPS = Coefficients(5e-3, 2.2e-5, 1.2e-10, 5e-5, 1.1e-8)
"""About a 70B-class model on eight H100: what matters here is only that batches have realistic sizes."""
KV_TOKENS = 3_000_000
KV_BYTES = 320 * 1024
LINK = 50e9
ROUTER = RouterConfig(max_queued_requests=10**8, max_queued_tokens=10**9)
RESULTS = Path(__file__).parents[1] / "docs" / "results" / "simulator_speed.json"


def deployment(pairs: int, block: int) -> Deployment:
    prefill = WorkerSpec(
        role="prefill",
        step_time=STEPS,
        num_blocks=KV_TOKENS // block,
        scheduler=PrefillSchedulerConfig(chunk_budget=16384, saturation_tokens=8192, max_waiting=10**6),
    )
    decode = WorkerSpec(
        role="decode",
        step_time=STEPS,
        num_blocks=KV_TOKENS // block,
        scheduler=DecodeSchedulerConfig(max_running=1024, max_waiting=10**6),
    )
    return Deployment(
        workers=(prefill,) * pairs + (decode,) * pairs,
        block_size=block,
        block_bytes=block * KV_BYTES,
        num_layers=80,
        topology=flat_topology(range(pairs), range(pairs, 2 * pairs), LINK, 5e-3),
    )


def mooncake(folder: Path) -> list[SimRequest]:
    records = load_trace("mooncake-conversation", folder)
    config = WorkloadConfig(num_requests=None, arrivals=Arrivals.TRACE)
    return requests_of(plan_arrivals(config, records, None, None), HASH_BLOCK_TOKENS)


def poisson(count: int, rate: float, prompt: int, output: int) -> list[SimRequest]:
    return PublishedWorkload(((prompt, output),) * count).requests(rate, 0, count)


def ours(cluster: Deployment, requests: list[SimRequest], rounds: int) -> tuple[float, SimResult]:
    """Seconds of the best round, and what came out."""
    best, result = float("inf"), None
    for _ in range(rounds):
        simulation = Simulation(cluster, SimulationConfig(router=ROUTER), [replace(r) for r in requests])
        began = time.perf_counter()
        result = simulation.run()
        best = min(best, time.perf_counter() - began)
    assert result is not None
    return best, result


def token_by_token(requests: list[SimRequest]) -> tuple[float, list[float]]:
    """Seconds, and when each request ended."""
    import simpy

    env = simpy.Environment()
    prompts, decodes = Queue(env), Queue(env)
    ends = [0.0] * len(requests)

    def arrive() -> Iterator[Any]:
        for request in requests:
            yield env.timeout(request.arrival / 1e9 - env.now)
            prompts.put([request, request.prompt_tokens, request.output_tokens])

    def prefill() -> Iterator[Any]:
        while True:
            if not prompts.waiting:
                yield prompts.come()
            batch, prompts.waiting = prompts.waiting, []
            tokens = sum(entry[1] for entry in batch)
            context = sum(entry[1] ** 2 / 2 for entry in batch)
            yield env.timeout(STEPS.step_s(StepShape(tokens, context)))
            for entry in batch:
                entry[2] -= 1
                decodes.put(entry)

    def decode() -> Iterator[Any]:
        running: list[list[Any]] = []
        while True:
            if not running and not decodes.waiting:
                yield decodes.come()
            running += decodes.waiting
            decodes.waiting = []
            context = sum(entry[1] + 1 for entry in running)
            yield env.timeout(STEPS.step_s(StepShape(0, 0.0, len(running), context)))
            left = []
            for entry in running:
                entry[1] += 1
                entry[2] -= 1
                if entry[2] > 0:
                    left.append(entry)
                else:
                    ends[entry[0].index] = env.now
            running = left

    for process in (arrive, prefill, decode):
        env.process(process())
    began = time.perf_counter()
    env.run()
    return time.perf_counter() - began, ends


def distserves(requests: list[SimRequest], folder: Path) -> float:
    """Seconds that the event loop of DistServe's simulator, in `folder`, takes."""
    import simpy

    sys.path.insert(0, str(folder))
    from simdistserve.benchmarks import simulate_dist

    spent: list[float] = []
    run = simpy.Environment.run

    def timed(self: Any, *args: Any, **options: Any) -> Any:
        began = time.perf_counter()
        found = run(self, *args, **options)
        spent.append(time.perf_counter() - began)
        return found

    rows = [
        {"start_time": r.arrival / 1e9, "prompt_len": r.prompt_tokens, "output_len": r.output_tokens}
        for r in requests
    ]
    with tempfile.TemporaryDirectory() as scratch:
        workload = Path(scratch) / "workload.json"
        workload.write_text(json.dumps(rows))
        words = "--backend distserve --model facebook/opt-13b --rate 1 --seed 0 --slo-scales [1.0]"
        words += f" --prefill-target 400 --decode-target 40 --N {len(rows)} --workload {workload}"
        simpy.Environment.run = timed
        try:
            simulate_dist.main(simulate_dist.parse_args(words.split()), outputs={})
        finally:
            simpy.Environment.run = run
    return spent[-1]


class Queue:
    """What waits, and an event for who waits for it."""

    def __init__(self, env: Any) -> None:
        self._env = env
        self._filled: Any = None
        self.waiting: list[list[Any]] = []

    def put(self, entry: list[Any]) -> None:
        self.waiting.append(entry)
        if self._filled is not None:
            self._filled.succeed()
            self._filled = None

    def come(self) -> Any:
        """The event that somebody has come, while nobody waits."""
        self._filled = self._env.event()
        return self._filled


WORKLOADS = (
    # requests, a second, prompt and output tokens
    (1000, 8.0, 512, 64),
    (1000, 4.0, 512, 512),
    (1000, 4.0, 512, 4096),
    (300, 1.0, 512, 16384),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--distserve", type=Path, metavar="FOLDER")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    seconds, result = ours(deployment(4, HASH_BLOCK_TOKENS), mooncake(data_folder(None, {})), options.rounds)
    trace = {
        "seconds": seconds,
        "requests": len(result.requests),
        "tokens": int(sum(r.output_tokens for r in result.requests)),
        "median_ttft_ms": float(np.median(result.ttft_ms)),
        "median_tpot_ms": float(np.median(result.tpot_ms)),
    }
    print("mooncake conversation, 4P4D:", trace, flush=True)
    rows = []
    for count, rate, prompt, output in WORKLOADS:
        requests = poisson(count, rate, prompt, output)
        mine, result = ours(deployment(1, 16), requests, options.rounds)
        theirs, ends = token_by_token(requests)
        published = distserves(requests, options.distserve) if options.distserve else None
        rows.append(
            {
                "requests": count,
                "rate": rate,
                "prompt": prompt,
                "output": output,
                "requests_s": count / mine,
                "requests_s_token_by_token": count / theirs,
                "ratio": theirs / mine,
                "requests_s_distserve": count / published if published else None,
                "ratio_distserve": published / mine if published else None,
                "mean_end_to_theirs": float(
                    np.mean([r.last_token / 1e9 for r in result.requests]) / np.mean(ends)
                ),
            }
        )
        print(rows[-1], flush=True)
    harness.write_result(options.output, {"mooncake_conversation_4p4d": trace, "token_by_token": rows})


if __name__ == "__main__":
    main()
