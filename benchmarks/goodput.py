"""Goodput of one prefill and one decode worker against colocated workers on the same two cores.

    .venv/bin/python -P benchmarks/goodput.py   # at most 40 minutes; writes docs/results/goodput.{json,png}

Three arrangements serve the same requests (Azure conversation lengths scaled to means of 256 in and 48 out,
Poisson arrivals, admission off): a prefill and a decode worker with a core each, two colocated workers with
a core each, and one colocated worker with two threads. Three regimes, fixed beforehand as multiples of the
unloaded latency, are judged on the same runs. The unloaded latency is measured first, on two colocated
workers: a lone request sees one core.

Arrangements take turns in rounds, in reverse order every second round, each with a fresh cluster. Rates are
chosen per arrangement: outwards until every regime's goodput is bracketed, then inside the widest bracket
while time is left."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from diphase.benchmarks import harness
from diphase.cluster.endpoint import open_channel
from diphase.cluster.load.client import LoadClient, LoopTimer, Outcome, RequestResult, fetch_model
from diphase.cluster.load.comparison import (
    Regime,
    Run,
    Unloaded,
    comparison_table,
    curves,
    goodputs,
    judge_run,
    measure_unloaded,
    ratio,
)
from diphase.cluster.load.plot import attainment_plot
from diphase.cluster.load.search import TARGET, RateSearch
from diphase.cluster.load.served import serving
from diphase.cluster.load.trace_formats import TraceRecord
from diphase.cluster.load.traces import data_folder, load_trace
from diphase.cluster.load.workload import ModelShape, PlannedRequest, WorkloadConfig, plan_load
from diphase.proto.errors import ConfigError, DiphaseError, InternalError
from diphase.proto.inference_pb2_grpc import InferenceStub
from diphase.proto.slo import Slo
from rich.console import Console

REGIMES = {
    "tight TPOT": Regime(ttft=10.0, tpot=1.5),
    "tight TTFT": Regime(ttft=2.0, tpot=6.0),
    "balanced": Regime(ttft=5.0, tpot=3.0),
}
CARRIED = "balanced"
"""The regime whose objectives the requests carry; the router sees no other."""

OURS = "1 prefill + 1 decode"
REFERENCE = "2 colocated"
TWO_THREADS = "1 colocated, 2 threads"

STOP_S = 10.0
"""Kept of each turn for stopping its cluster."""
REQUEST_S = 900.0
"""Longest life of one request."""
MARGIN = 1.1
"""A run's time over that of its arrivals alone, when it is judged whether it still fits."""

BUSY = 0.5
"""Load average above which something else is using the cores."""


def settings(cores: list[int]) -> dict[str, list[str]]:
    """`--set` values of each arrangement, the one that measures the unloaded latency first."""
    first, second = cores
    return {
        REFERENCE: [
            "pools.prefill.workers=0",
            "pools.decode.workers=0",
            "pools.colocated.workers=2",
            f"pools.colocated.cores=[{first}, {second}]",
            "engine.threads=1",
        ],
        OURS: [
            "pools.prefill.workers=1",
            f"pools.prefill.cores=[{first}]",
            "pools.decode.workers=1",
            f"pools.decode.cores=[{second}]",
            "pools.colocated.workers=0",
            "engine.threads=1",
        ],
        TWO_THREADS: [
            "pools.prefill.workers=0",
            "pools.decode.workers=0",
            "pools.colocated.workers=1",
            f"pools.colocated.cores=[{first}, {second}]",
            "engine.threads=2",
        ],
    }


def check_whole(results: list[RequestResult], rate: float) -> None:
    """A run is a measurement only when every request was answered, be it late.

    Raises:
        InternalError: some failed; the message counts them by reason.
    """
    reasons = Counter(r.detail for r in results if r.outcome is Outcome.FAILED)
    if reasons:
        counts = "; ".join(f"{count} × {reason}" for reason, count in reasons.items())
        raise InternalError(f"the run at {rate:.2f}/s does not count, requests failed: {counts}")


@dataclass(kw_only=True)
class Comparison:
    """The whole measurement and what it knows so far."""

    options: argparse.Namespace
    console: Console
    records: list[TraceRecord]
    log: Path
    unloaded: dict[str, Unloaded] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    """Turns that a failure cut short; what they had measured before it stands."""
    sent_plans: int = 0
    load_before: float = field(default_factory=lambda: os.getloadavg()[0])
    """Of the last minute: what else the machine was doing."""

    @property
    def objectives(self) -> dict[str, Slo]:
        return {name: regime.slo(self.unloaded[REFERENCE]) for name, regime in REGIMES.items()}

    async def measure(self) -> None:
        """All rounds, within the minutes that were given."""
        if self.load_before > BUSY:
            warning = f"the machine is busy (load average {self.load_before:.1f}): numbers will not repeat"
            self.console.print(warning, style="yellow", highlight=False)
        arrangements = settings(self.options.cores)
        turns = [
            (round_index, name)
            for round_index in range(self.options.rounds)
            for name in (list(arrangements) if round_index % 2 == 0 else reversed(arrangements))
        ]
        end = time.monotonic() + self.options.minutes * 60.0
        for i, (round_index, name) in enumerate(turns):
            until = time.monotonic() + (end - time.monotonic()) / (len(turns) - i)
            self.console.print(f"round {round_index + 1}: {name}", style="bold", highlight=False)
            values = [*arrangements[name], 'router.admission="queue"', f'model.name="{self.options.model}"']
            try:
                async with serving([*values, *self.options.set], self.log) as address:
                    await self._take_turn(address, name, round_index, until - STOP_S)
            except DiphaseError as exc:
                # A broken cluster ends its turn, not the comparison: the next one starts afresh.
                self._note_fault(f"{name}, round {round_index + 1}: {exc.message}")
                if REFERENCE not in self.unloaded:
                    raise

    async def _take_turn(self, address: str, name: str, round_index: int, until: float) -> None:
        async with open_channel(address) as channel:
            stub = InferenceStub(channel)
            model = await fetch_model(stub, address)
            shape = ModelShape(context_length=model.context_length, vocab_size=model.vocab_size)
            lone = await self._send_lone(stub, shape, name)
            if name not in self.unloaded:
                self.unloaded[name] = measure_unloaded(lone)
            # Two cores' worth of requests that have a core each: below what batching makes of them.
            start = 2.0 / self.unloaded[REFERENCE].request_s
            search = RateSearch(
                start=start,
                factor=1.6,
                lowest=start / 16,
                highest=start * 16,
                tolerance=self.options.tolerance,
            )
            while True:
                # What a run takes is, but for its queue's end, the time of its arrivals.
                floor = MARGIN * self.options.requests / max(until - time.monotonic(), 1e-3)
                rate = search.next_rate(curves(self.runs, name, REGIMES), floor)
                if rate is None:
                    break
                results = await self._client(stub).run_open_loop(self._plan(shape, rate))
                check_whole(results, rate)
                run = judge_run(
                    results,
                    arrangement=name,
                    round_index=round_index,
                    rate=rate,
                    objectives=self.objectives,
                    carried=self._carried(),
                )
                self._note(run)

    async def _send_lone(self, stub: InferenceStub, shape: ModelShape, name: str) -> list[RequestResult]:
        """Single requests: the arrangement's first turn measures with them, later ones only warm up."""
        plan = sorted(self._plan(shape, 1.0), key=lambda planned: planned.input_tokens)
        count = 3 if name in self.unloaded else self.options.lone
        # Evenly over the lengths, so that few requests show the same percentiles as all.
        picks = [plan[int((i + 0.5) * len(plan) / count)] for i in range(count)]
        client = LoadClient(stub, slo=Slo(), timeout_s=REQUEST_S, timer=LoopTimer())
        await client.run_one_by_one(picks[:1])
        return await client.run_one_by_one(picks)

    def _plan(self, shape: ModelShape, rate: float) -> list[PlannedRequest]:
        """The same arrivals and lengths for every arrangement; prompts that nobody has seen before."""
        workload = WorkloadConfig(
            num_requests=self.options.requests,
            mean_input=256,
            mean_output=48,
            # The lengths that the unloaded latency was measured with, in every round: their tail decides.
            seed=self.options.seed,
        )
        self.sent_plans += 1
        return plan_load(workload, self.records, shape, rate, self.sent_plans)

    def _carried(self) -> Slo:
        return self.objectives[CARRIED]

    def _client(self, stub: InferenceStub) -> LoadClient:
        return LoadClient(stub, slo=self._carried(), timeout_s=REQUEST_S, timer=LoopTimer())

    def _note_fault(self, fault: str) -> None:
        self.faults.append(fault)
        self.console.print(fault, style="red", markup=False, highlight=False)

    def _note(self, run: Run) -> None:
        self.runs.append(run)
        report = run.report
        shares = ", ".join(f"{name} {point.attainment:.0%}" for name, point in run.points.items())
        ttft, tpot, late = report.ttft_ms, report.tpot_ms, report.lateness_ms
        details = (
            f"TTFT p50 {ttft.p50:.0f} p90 {ttft.p90:.0f} ms, TPOT p50 {tpot.p50:.0f} p90 {tpot.p90:.0f} ms"
            if ttft and tpot
            else "nothing came back"
        )
        lateness = f", sent late p99 {late.p99:.1f} ms" if late else ""
        self.console.print(
            f"  {report.rate:6.2f}/s  {shares}; {details}{lateness}", highlight=False, soft_wrap=True
        )

    def conclude(self) -> None:
        """Prints the table and writes the files."""
        names = list(settings(self.options.cores))
        found = goodputs(self.runs, names, list(REGIMES))
        self.console.print(comparison_table(found, OURS, self.objectives))
        output = Path(self.options.output)
        content = {
            "load_average_before": self.load_before,
            "arrangements": settings(self.options.cores),
            "further_settings": self.options.set,
            "regimes": REGIMES,
            "unloaded": self.unloaded,
            "objectives": self.objectives,
            "target": TARGET,
            "goodput": found,
            "ratio": {regime: ratio(by_name, OURS) for regime, by_name in found.items()},
            "faults": self.faults,
            "runs": self.runs,
        }
        harness.write_result(output.with_name(output.name + ".json"), content)
        panels = {
            f"{regime}: TTFT ≤ {slo.ttft_ms:.0f} ms, TPOT ≤ {slo.tpot_ms:.0f} ms": {
                name: curves(self.runs, name, REGIMES)[regime] for name in names
            }
            for regime, slo in self.objectives.items()
        }
        attainment_plot(output.with_name(output.name + ".png"), panels, TARGET)
        self.console.print(f"wrote {output}.json and {output}.png", highlight=False)


def parse() -> argparse.Namespace:
    root = Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--minutes", type=float, default=38.0, help="time for all rounds (%(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each arrangement (%(default)s)")
    parser.add_argument("--requests", type=int, default=120, help="requests a point (%(default)s)")
    parser.add_argument("--lone", type=int, default=20, help="requests of the unloaded latency (%(default)s)")
    parser.add_argument("--tolerance", type=float, default=0.1, help="narrowest bracket (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of lengths and arrivals (%(default)s)")
    parser.add_argument("--model", default="smollm2", help="default: %(default)s")
    parser.add_argument(
        "--data", metavar="DIR", help="folder of the traces (DIPHASE_DATA, else ../shared/data)"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="K=V", help="further settings for all clusters"
    )
    parser.add_argument("--output", default=str(root / "docs" / "results" / "goodput"), metavar="PATH")
    options = parser.parse_args()
    options.cores = sorted(os.sched_getaffinity(0))[:2]
    if len(options.cores) < 2:
        raise ConfigError("the comparison needs two cores")
    if not 2 <= options.lone <= options.requests:
        raise ConfigError(f"--lone {options.lone} must be 2 to --requests ({options.requests})")
    if options.rounds < 1 or options.minutes <= 0.0:
        raise ConfigError("--rounds and --minutes must be above 0")
    return options


async def compare(options: argparse.Namespace, console: Console) -> int:
    """The exit status: 1 when a turn failed."""
    records = load_trace("azure-conv", data_folder(options.data, os.environ))
    with tempfile.TemporaryDirectory(prefix="diphase-goodput-") as folder:
        comparison = Comparison(
            options=options, console=console, records=records, log=Path(folder) / "serve.log"
        )
        try:
            await comparison.measure()
        finally:  # also when told to end: what there is by then is written
            if comparison.runs:
                comparison.conclude()
        return 1 if comparison.faults else 0


def main() -> int:
    console = Console()
    try:
        return harness.run(compare(parse(), console))
    except DiphaseError as exc:
        console.print(exc.message, style="red", markup=False, highlight=False)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
