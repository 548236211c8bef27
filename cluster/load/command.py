"""`diphase bench`: load on a running cluster, at one rate, over several, or in search of its goodput."""

from __future__ import annotations

import argparse
import asyncio
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ...proto import inference_pb2 as pb
from ...proto.errors import ConfigError
from ...proto.inference_pb2_grpc import InferenceStub
from ...proto.slo import Slo, slo_from_proto
from ...router.config import GatewayConfig
from ..endpoint import open_channel
from .client import LoadClient, LoopTimer, RequestResult, Timer, fetch_model
from .report import (
    LoadReport,
    check_output,
    environment,
    goodput_text,
    run_table,
    summarise,
    sweep_table,
    write_json,
)
from .search import TARGET, RateSearch, goodput
from .trace_formats import TraceRecord
from .traces import TRACES, data_folder, load_trace
from .workload import Arrivals, ModelShape, WorkloadConfig, plan_load

FIXED = "fixed"
WARM_UP_SALT = 2**31
"""Salt of warm-up prompts; runs count from 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchConfig:
    """What one `diphase bench` does."""

    address: str
    """host:port of a gateway."""
    token: str = ""
    """The cluster's; gateways beyond loopback ask for it."""
    trace: str = FIXED
    """A name of traces.TRACES, the path of a log, or "fixed" for equal lengths."""
    data: str | None = None
    """Folder of the traces; None: DIPHASE_DATA, else ../shared/data beside the repository."""
    rates: tuple[float, ...] = ()
    """Requests a second, one run each; empty keeps a trace's own times. A search starts at the first."""
    search: bool = False
    """Look for the goodput instead of running every rate."""
    max_points: int = 12
    """Runs that a search may take."""
    ttft_ms: float | None = None
    """Objective; None: the cluster's default."""
    tpot_ms: float | None = None
    timeout_s: float = 600.0
    """Longest life of one request."""
    warm_up: int = 2
    """Requests sent one by one beforehand and not counted."""
    output: Path = Path("diphase-bench")
    """Files are this plus .json and .png."""
    workload: WorkloadConfig = field(default_factory=WorkloadConfig)

    def __post_init__(self) -> None:
        for rate in self.rates:
            if not 0.0 < rate < 1e6:
                raise ConfigError(f"--rate {rate:g} is out of range; use requests a second above 0")
        if self.search and self.workload.arrivals is Arrivals.TRACE and not self.rates:
            raise ConfigError("--search needs --rate to start from")
        if not self.rates and self.workload.arrivals is not Arrivals.TRACE:
            raise ConfigError("--rate is missing; only trace arrivals have times of their own")
        if self.max_points < 1:
            raise ConfigError(f"--max-points {self.max_points}; allow at least 1")
        if not 0.0 < self.timeout_s <= 86_400.0:
            raise ConfigError(f"--timeout-s {self.timeout_s:g} is out of range; use up to 86400")
        if self.warm_up < 0:
            raise ConfigError(f"--warm-up {self.warm_up}; use 0 or more")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `diphase bench` on a (sub)parser."""
    where = parser.add_argument_group("where")
    where.add_argument("--address", metavar="HOST:PORT", help="of a gateway (default: as configured)")
    where.add_argument(
        "--output", default="diphase-bench", metavar="PATH", help="write PATH.json and PATH.png"
    )
    where.add_argument(
        "--data", metavar="DIR", help="folder of the traces (DIPHASE_DATA, else ../shared/data)"
    )
    load = parser.add_argument_group("load")
    load.add_argument("--rate", default="", metavar="R[,R…]", help="requests/s; several make a sweep")
    load.add_argument("--search", action="store_true", help="find the goodput, starting at the first --rate")
    load.add_argument(
        "--max-points", type=int, metavar="N", default=12, help="most runs of a search (%(default)s)"
    )
    load.add_argument("--requests", type=int, metavar="N", default=200, help="requests a run (%(default)s)")
    load.add_argument(
        "--arrivals", choices=[*Arrivals], default=Arrivals.POISSON.value, help="default: %(default)s"
    )
    load.add_argument(
        "--cv", type=float, metavar="CV", default=1.0, help="burstiness of gamma arrivals (%(default)s)"
    )
    load.add_argument(
        "--trace",
        metavar="TRACE",
        default=FIXED,
        help=f"lengths, and trace arrivals: {FIXED}, {', '.join(TRACES)}, or a .csv or .jsonl (%(default)s)",
    )
    load.add_argument("--mean-input", type=int, metavar="N", help="mean prompt tokens (fixed: 256)")
    load.add_argument("--mean-output", type=int, metavar="N", help="mean completion tokens (fixed: 48)")
    load.add_argument("--text", action="store_true", help="prompts of words instead of token ids")
    load.add_argument("--seed", type=int, metavar="N", default=0, help="default: %(default)s")
    load.add_argument(
        "--warm-up", type=int, metavar="N", default=2, help="requests before the first run (%(default)s)"
    )
    judging = parser.add_argument_group("objectives")
    judging.add_argument("--ttft-ms", type=float, metavar="MS", help="default: the cluster's")
    judging.add_argument("--tpot-ms", type=float, metavar="MS", help="default: the cluster's")
    judging.add_argument(
        "--timeout-s", type=float, metavar="S", default=600.0, help="give a request up (%(default)s)"
    )


def config_from(args: argparse.Namespace, address: str, token: str = "") -> BenchConfig:
    """The checked configuration.

    Raises:
        ConfigError: a value is malformed or out of range.
    """
    try:
        rates = tuple(float(rate) for rate in args.rate.split(",") if rate.strip())
    except ValueError:
        raise ConfigError(f"--rate {args.rate!r} is no number or list of numbers such as 0.5,1,2") from None
    fixed = args.trace == FIXED and args.mean_input is None and args.mean_output is None
    return BenchConfig(
        address=address,
        token=token,
        trace=args.trace,
        data=args.data,
        rates=rates,
        search=args.search,
        max_points=args.max_points,
        ttft_ms=args.ttft_ms,
        tpot_ms=args.tpot_ms,
        timeout_s=args.timeout_s,
        warm_up=args.warm_up,
        output=Path(args.output),
        workload=WorkloadConfig(
            num_requests=args.requests,
            arrivals=Arrivals(args.arrivals),
            cv=args.cv,
            mean_input=256 if fixed else args.mean_input,
            mean_output=48 if fixed else args.mean_output,
            seed=args.seed,
            text=args.text,
        ),
    )


def run(args: argparse.Namespace, address: str = "", token: str = "") -> int:
    """Runs the command against the gateway at --address, else at `address`, else where a gateway listens by
    default; the exit status, 1 when a run had no request that finished.

    Raises:
        ConfigError: an option is wrong, no gateway answers, or a trace is missing.
    """
    default = GatewayConfig()
    address = args.address or address or f"{default.host}:{default.port}"
    try:
        return asyncio.run(bench(config_from(args, address, token), Console()))
    except KeyboardInterrupt:
        return 130


async def bench(config: BenchConfig, console: Console, timer: Timer | None = None) -> int:
    """`run` on a running event loop, with a console to write to.

    Raises:
        ConfigError: no gateway answers, a trace is missing, lengths do not fit the model, or the output's
            folder cannot be written.
    """
    check_output(config.output)
    records = [] if config.trace == FIXED else load_trace(config.trace, data_folder(config.data, os.environ))
    async with open_channel(config.address) as channel:
        stub = InferenceStub(channel)
        model = await fetch_model(stub, config.address, config.token)
        runner = _Runner(config, console, stub=stub, model=model, records=records, timer=timer or LoopTimer())
        await runner.warm_up()
        reports = await (runner.search() if config.search else runner.sweep())
    _conclude(config, console, runner, reports)
    return 0 if all(report.outcomes.get("finished") for report in reports) else 1


class _Runner:
    """Makes runs of one configuration and shows them."""

    def __init__(
        self,
        config: BenchConfig,
        console: Console,
        *,
        stub: InferenceStub,
        model: pb.GetModelResponse,
        records: list[TraceRecord],
        timer: Timer,
    ) -> None:
        default = slo_from_proto(model.default_slo, Slo())
        self.slo = replace(
            default,
            ttft_ms=default.ttft_ms if config.ttft_ms is None else config.ttft_ms,
            tpot_ms=default.tpot_ms if config.tpot_ms is None else config.tpot_ms,
        )
        self.model = model.model
        self._config = config
        self._console = console
        self._stub = stub
        self._shape = ModelShape(context_length=model.context_length, vocab_size=model.vocab_size)
        self._records = records
        self._timer = timer
        self._runs = 0

    async def warm_up(self) -> None:
        """Opens connections and takes first-time costs out of the measurement."""
        if self._config.warm_up == 0:
            return
        workload = replace(
            self._config.workload, num_requests=self._config.warm_up, arrivals=Arrivals.POISSON
        )
        plan = plan_load(workload, self._records, self._shape, 1.0, WARM_UP_SALT)
        await self._client(None).run_one_by_one(plan)

    async def run_at(self, rate: float | None) -> LoadReport:
        """One run; prompts differ from those of earlier runs."""
        plan = plan_load(self._config.workload, self._records, self._shape, rate, self._runs)
        self._runs += 1
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
        ) as progress:
            label = "at the trace's times" if rate is None else f"{rate:.3g} requests/s"
            bar = progress.add_task(label, total=len(plan))
            results = await self._client(lambda _: progress.advance(bar)).run_open_loop(plan)
        report = summarise(results, self.slo, rate)
        self._console.print(run_table(report, self.slo))
        for error, count in report.errors.items():
            self._console.print(f"{count} × {error}", style="red", markup=False, highlight=False)
        return report

    async def sweep(self) -> list[LoadReport]:
        return [await self.run_at(rate) for rate in (self._config.rates or (None,))]

    async def search(self) -> list[LoadReport]:
        planner = RateSearch(start=self._config.rates[0], lowest=min(0.05, self._config.rates[0]))
        reports: list[LoadReport] = []
        while len(reports) < self._config.max_points:
            rate = planner.next_rate({"": [report.point for report in reports]})
            if rate is None:
                break
            reports.append(await self.run_at(rate))
        return reports

    def _client(self, on_done: Callable[[RequestResult], None] | None) -> LoadClient:
        return LoadClient(
            self._stub,
            slo=self.slo,
            timeout_s=self._config.timeout_s,
            timer=self._timer,
            token=self._config.token,
            on_done=on_done,
        )


def _conclude(config: BenchConfig, console: Console, runner: _Runner, reports: list[LoadReport]) -> None:
    """The sweep's table, the goodput, the files."""
    content: dict[str, Any] = {
        "command": shlex.join(["diphase", *sys.argv[1:]]),
        **environment(),
        "model": runner.model,
        "trace": config.trace,
        "workload": config.workload,
        "slo": runner.slo,
        "target": TARGET,
        "runs": reports,
    }
    written = [config.output.with_name(config.output.name + ".json")]
    if len(reports) > 1:
        points = [report.point for report in reports]
        found = goodput(points)
        content["goodput"] = found
        console.print(sweep_table(reports))
        console.print(
            f"goodput at {TARGET:.0%} attainment: {goodput_text(found)} requests/s", highlight=False
        )
        from .plot import attainment_plot  # matplotlib takes half a second, which most commands need not wait

        written.append(config.output.with_name(config.output.name + ".png"))
        title = f"TTFT ≤ {runner.slo.ttft_ms:g} ms, TPOT ≤ {runner.slo.tpot_ms:g} ms"
        attainment_plot(written[1], {title: {runner.model or "cluster": points}}, TARGET)
    write_json(written[0], content)
    console.print(f"wrote {', '.join(map(str, written))}", markup=False, highlight=False)
