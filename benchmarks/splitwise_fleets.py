"""Splitwise's study of fleets (ISCA 2024, section VI) at a quarter of its size, with this cluster's policies.

    .venv/bin/python -P benchmarks/splitwise_fleets.py   # writes docs/results/splitwise_fleets.json

Machines are a DGX A100, a DGX H100 and one whose GPUs are capped, with the step times that Splitwise measured
on eight GPUs. A fleet is what ten DGX H100 cost or draw: all mixed (the baselines), or in a prompt and a
token pool (AA, HH, HA, HHcap) whose split is searched. Throughput is the rate at which all nine percentiles
of the study are inside: TTFT, time between tokens and end to end, as multiples of a lone request's on an
A100.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from diphase.benchmarks import harness
from diphase.cluster.load.traces import data_folder, load_trace
from diphase.cluster.load.workload import WorkloadConfig
from diphase.cluster.planner.bounds import lone_prefill_s, lone_token_s
from diphase.cluster.planner.deployment import Deployment, WorkerSpec
from diphase.cluster.planner.goodput import Objectives, Pattern, largest_rate, simulate
from diphase.cluster.planner.records import SimResult
from diphase.cluster.planner.sim_workload import SimWorkload
from diphase.cluster.planner.splitwise import splitwise_step_time
from diphase.cluster.planner.topology import Topology
from diphase.decode_workers.config import ColocatedSchedulerConfig, DecodeSchedulerConfig
from diphase.prefill_workers.config import PrefillSchedulerConfig
from diphase.router.step_time import StepTime

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "splitwise_fleets.json"
SLOWDOWNS = {"TTFT": (2.0, 3.0, 6.0), "TBT": (1.25, 1.5, 5.0), "E2E": (1.25, 1.5, 5.0)}
"""At the 50th, 90th and 99th percentile."""
BLOCK = 16
NO_LIMIT = Objectives(ttft_ms=3.6e6, tpot_ms=3.6e6)
TOLERANCE = 0.05
REQUESTS = {"azure-code": 600, "azure-conv": 1500}
"""Of a simulation: three lives of a request, else it would measure how a cluster fills up."""
PUBLISHED_SPLIT = {"azure-code": 35 / 40, "azure-conv": 25 / 40}
"""Prompt machines of forty H100."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A DGX."""

    hardware: str
    """In the measurements."""
    power: float
    """As in the study's experiments: 40 H100 draw what 70 A100 do."""
    dollars: float
    """An hour (table I)."""
    link: float
    """Bytes a second of its eight ports."""


A100 = Machine(hardware="a100-80gb", power=24.8, dollars=17.6, link=8 * 25e9)
H100 = Machine(hardware="h100-80gb", power=44.0, dollars=38.0, link=8 * 50e9)
CAPPED = Machine(hardware="h100-80gb-pcap", power=30.8, dollars=38.0, link=8 * 50e9)


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """Served on eight GPUs of 80 GiB, of which 92 % hold weights and KV, in 16 bits."""

    layers: int
    kv_bytes: int
    """A token."""
    weights: float

    @property
    def blocks(self) -> int:
        return int((8 * 80 * 2**30 * 0.92 - self.weights) / self.kv_bytes) // BLOCK


MODELS = {
    "llama2-70b": Model(layers=80, kv_bytes=2 * 80 * 8 * 128 * 2, weights=138e9),
    "bloom-176b": Model(layers=70, kv_bytes=2 * 70 * 112 * 128 * 2, weights=352e9),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """So many machines of each kind."""

    prompt: Machine
    token: Machine
    prompts: int
    tokens: int
    """0: the prompt machines do both."""

    @property
    def power(self) -> float:
        return self.prompts * self.prompt.power + self.tokens * self.token.power

    @property
    def dollars(self) -> float:
        return self.prompts * self.prompt.dollars + self.tokens * self.token.dollars


@dataclass(slots=True, kw_only=True)
class Study:
    """One model and one trace."""

    folder: Path
    model: str
    trace: str
    runs: int = 0
    _steps: dict[str, StepTime] = field(default_factory=dict)
    _workload: SimWorkload | None = None
    _known: dict[Split, float] = field(default_factory=dict)

    @property
    def workload(self) -> SimWorkload:
        if self._workload is None:
            config = WorkloadConfig(num_requests=REQUESTS[self.trace])
            self._workload = SimWorkload(config=config, records=load_trace(self.trace, self.folder))
        return self._workload

    def step_time(self, machine: Machine) -> StepTime:
        name = machine.hardware
        if name not in self._steps:
            self._steps[name] = splitwise_step_time(self.folder, model=self.model, hardware=name, tp=8)
        return self._steps[name]

    def deployment(self, split: Split) -> Deployment:
        shape = MODELS[self.model]

        def worker(
            role: str, machine: Machine, scheduler: PrefillSchedulerConfig | DecodeSchedulerConfig
        ) -> WorkerSpec:
            steps = self.step_time(machine)
            return WorkerSpec(
                role=role, step_time=steps, num_blocks=shape.blocks, scheduler=scheduler, gpus=8
            )

        if not split.tokens:
            mixed = ColocatedSchedulerConfig(max_running=512, prefill_budget=2048)
            return Deployment(
                workers=(worker("colocated", split.prompt, mixed),) * split.prompts, block_size=BLOCK
            )
        prefill = PrefillSchedulerConfig(chunk_budget=8192, saturation_tokens=2048)
        decode = DecodeSchedulerConfig(max_running=512)
        prompts, tokens = range(split.prompts), range(split.prompts, split.prompts + split.tokens)
        return Deployment(
            workers=(worker("prefill", split.prompt, prefill),) * split.prompts
            + (worker("decode", split.token, decode),) * split.tokens,
            block_size=BLOCK,
            block_bytes=BLOCK * shape.kv_bytes,
            num_layers=shape.layers,
            topology=Topology(
                bandwidths=(split.prompt.link,) * split.prompts + (split.token.link,) * split.tokens,
                paths={(source, target): (source, target) for source in prompts for target in tokens},
                latency_s=0.005,
            ),
        )

    def slowdowns(self, result: SimResult) -> dict[str, list[float]]:
        """The three percentiles of each time, as multiples of a lone request's on an A100."""
        steps = self.step_time(A100)
        lengths = [(request.prompt_tokens, request.output_tokens) for request in result.requests]
        ttft = np.array([lone_prefill_s(steps, prompt, 8192) for prompt, _ in lengths]) * 1e3
        tbt = np.array([lone_token_s(steps, prompt, output) for prompt, output in lengths]) * 1e3
        after = np.array([output - 1 for _, output in lengths])
        several = after > 0
        times = {
            "TTFT": result.ttft_ms / ttft,
            "TBT": result.tpot_ms[several] / tbt[several],
            "E2E": (result.ttft_ms + result.tpot_ms * after) / (ttft + tbt * after),
        }
        return {name: np.percentile(slow, (50, 90, 99)).tolist() for name, slow in times.items()}

    def throughput(self, split: Split, guess: float) -> float:
        """Requests/s."""
        if split in self._known:
            return self._known[split]
        deployment = self.deployment(split)

        def good(rate: float) -> bool:
            self.runs += 1
            pattern = Pattern(0, REQUESTS[self.trace])
            result = simulate(deployment, self.workload, NO_LIMIT, rate, pattern, policy="splitwise")
            slow = self.slowdowns(result)
            return all(
                value <= most
                for name in SLOWDOWNS
                for value, most in zip(slow[name], SLOWDOWNS[name], strict=True)
            )

        self._known[split] = largest_rate(good, guess, math.inf, TOLERANCE)
        return self._known[split]

    def best(self, split_of: Callable[[int], Split | None], start: int, guess: float) -> Split:
        """The split with the highest throughput, uphill from the study's."""

        def served(prompts: int) -> float:
            split = split_of(prompts) if prompts > 0 else None
            return -1.0 if split is None else self.throughput(split, guess)

        at = start
        while True:
            better = max((at - 1, at, at + 1), key=lambda p: (served(p), p == at))
            if better == at:
                found = split_of(at)
                assert found is not None  # it serves something
                return found
            at = better


def study(folder: Path, model: str, trace: str, machines: int) -> tuple[list[dict[str, Any]], int]:
    """(a row for each design, simulations)."""
    one = Study(folder=folder, model=model, trace=trace)
    power, dollars = machines * H100.power, machines * H100.dollars

    def mixed(machine: Machine, count: int) -> Split:
        return Split(prompt=machine, token=machine, prompts=count, tokens=0)

    def pools(prompt: Machine, token: Machine, of: str, most: float) -> Split:
        """The best split of a budget of power or of dollars."""

        def split_of(prompts: int) -> Split | None:
            left = most - prompts * getattr(prompt, of)
            tokens = math.floor(left / getattr(token, of) + 1e-9)
            return Split(prompt=prompt, token=token, prompts=prompts, tokens=tokens) if tokens > 0 else None

        whole = math.floor(most / getattr(prompt, of))
        start = min(whole - 1, round(PUBLISHED_SPLIT[trace] * whole))
        return one.best(split_of, start, 2.0 * machines)

    same_power = math.floor(power / A100.power)
    split_hh = pools(H100, H100, "power", power)
    designs = {
        "Baseline-H100": mixed(H100, machines),
        "Baseline-A100": mixed(A100, same_power),
        "Splitwise-AA": pools(A100, A100, "power", same_power * A100.power),
        "Splitwise-AA, same cost": pools(A100, A100, "dollars", dollars),
        "Splitwise-HH": split_hh,
        "Splitwise-HHcap, the machines of HH": Split(
            prompt=H100, token=CAPPED, prompts=split_hh.prompts, tokens=split_hh.tokens
        ),
        "Splitwise-HHcap": pools(H100, CAPPED, "power", power),
        "Splitwise-HHcap, three quarters of the power": pools(H100, CAPPED, "power", 0.75 * power),
        "Splitwise-HA": pools(H100, A100, "power", power),
    }
    base = one.throughput(designs["Baseline-H100"], 2.0 * machines)
    rows = []
    for name, split in designs.items():
        served = one.throughput(split, 2.0 * machines)
        rows.append(
            {
                "model": model,
                "trace": trace,
                "design": name,
                "prompt_machines": split.prompts,
                "token_machines": split.tokens,
                "requests_per_s": served,
                "to_baseline_h100": served / base if base else None,
                "power": split.power / power,
                "cost": split.dollars / dollars,
            }
        )
        print(rows[-1], flush=True)
    return rows, one.runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=[*MODELS], default=["bloom-176b"])
    parser.add_argument("--traces", nargs="+", choices=[*PUBLISHED_SPLIT], default=[*PUBLISHED_SPLIT])
    parser.add_argument("--machines", type=int, default=10, help="DGX H100 that are the budget")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    folder = data_folder(None, {})
    rows: list[dict[str, Any]] = []
    runs = 0
    for model in options.models:
        for trace in options.traces:
            more, took = study(folder, model, trace, options.machines)
            rows, runs = rows + more, runs + took
    harness.write_result(
        options.output,
        {"machines": options.machines, "requests": REQUESTS, "simulations": runs, "rows": rows},
    )


if __name__ == "__main__":
    main()
