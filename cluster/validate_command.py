"""`diphase validate`: serves a workload with a cluster on this machine and with the simulator, and says how
far they are apart.

Both get the same arrivals and lengths, and the simulator the profile that `diphase profile` made here.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import shlex
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..checkpoints.lookup import resolve
from ..proto.errors import ConfigError, InternalError
from ..proto.slo import Slo
from ..proto.slo import Verdict as SloVerdict
from .load.client import LoadClient, LoopTimer, Outcome, RequestResult
from .load.report import check_output, environment, judge, write_json
from .load.trace_formats import TraceRecord
from .load.traces import TRACES, data_folder, load_trace
from .load.workload import Arrival, Arrivals, ModelShape, WorkloadConfig, plan_arrivals, plan_load
from .machine_speed import Slower, SpeedProbe, between, speed_probe
from .one_machine import PLACEMENTS, OneMachine
from .planner.prediction import deployment_of, predict
from .planner.profile import Profile, ServingCost, load_profile
from .planner.records import SimResult
from .planner.validation import (
    GOOD_ERROR,
    GOOD_POINTS,
    PERCENTILES,
    Figures,
    Parts,
    Validation,
    figures_of,
    figures_of_simulation,
    verdict_of,
)
from .profile_command import OUTPUT as PROFILE

SHARES = (0.3, 0.5, 0.7)
"""Rates where none are given, of what the simulation can serve."""
ALL_AT_ONCE = 1e4
"""Requests a second: a queue that never empties."""
WARM_UP = 5
PART = 10
"""Requests between two looks at the machine's speed."""
MOST_REQUESTS = 10_000
REQUEST_S = 900.0
"""Longest life of one request."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `diphase validate`."""
    parser.add_argument("--model", metavar="NAME", help="as model.name (default: as configured)")
    parser.add_argument(
        "--profile", type=Path, default=Path(PROFILE), metavar="FILE", help="of this machine (%(default)s)"
    )
    parser.add_argument("--placement", choices=[*PLACEMENTS], default="1p1d", help="default: %(default)s")
    parser.add_argument(
        "--rates", default="", metavar="R[,R…]", help="requests/s (default: from the simulated capacity)"
    )
    parser.add_argument("--requests", type=int, default=100, metavar="N", help="a rate (%(default)s)")
    parser.add_argument(
        "--trace", default="azure-conv", help=f"lengths: {', '.join(TRACES)} or a log (%(default)s)"
    )
    parser.add_argument(
        "--data", metavar="DIR", help="folder of the traces (DIPHASE_DATA, else ../shared/data)"
    )
    parser.add_argument("--mean-input", type=int, default=256, metavar="N", help="tokens (%(default)s)")
    parser.add_argument("--mean-output", type=int, default=48, metavar="N", help="tokens (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    parser.add_argument("--ttft-ms", type=float, metavar="MS", help="objective (default: as configured)")
    parser.add_argument("--tpot-ms", type=float, metavar="MS", help="objective (default: as configured)")
    parser.add_argument(
        "--output", type=Path, default=Path("diphase-validate.json"), metavar="FILE", help="(%(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Runs the command; the exit status, 1 when the errors are not within their marks.

    Raises:
        ConfigError: an option is wrong, or the profile does not hold for this configuration.
        CheckpointError: there is no such model.
        InternalError: the cluster failed.
    """
    console = Console()
    machine = OneMachine(args, args.placement)
    profile = _profile(args.profile, machine.config.model.name)
    check_output(args.output)
    if not 1 <= args.requests <= MOST_REQUESTS:
        raise ConfigError(f"--requests {args.requests} is out of range; use 1 to {MOST_REQUESTS}")
    workload = WorkloadConfig(
        num_requests=args.requests,
        arrivals=Arrivals.POISSON,
        mean_input=args.mean_input,
        mean_output=args.mean_output,
        seed=args.seed,
    )
    records = load_trace(args.trace, data_folder(args.data, os.environ))
    slo = _slo(args, machine.config.slo.slo())
    asked = rates_from(args.rates)
    # What does not fit is said before anything is started.
    deployment_of(machine.config, profile)
    plan_arrivals(workload, records, profile.engine.context_length, 1.0)
    resolve(machine.config.model.name)
    with speed_probe(machine.config) as probe:
        task = _Task(
            machine=machine, profile=profile, workload=workload, records=records, slo=slo, probe=probe
        )
        validations = asyncio.run(task.validate(asked or task.rates(), console))
    verdict = verdict_of(validations)
    write_json(
        args.output,
        {
            "command": shlex.join(["diphase", *sys.argv[1:]]),
            **environment(),
            "placement": args.placement,
            "trace": args.trace,
            "workload": workload,
            "slo": slo,
            "profile": profile.to_dict() | {"cells": len(profile.cells)},
            "rates": [validation.to_dict() for validation in validations],
            "verdict": verdict,
        },
    )
    error = "–" if verdict.median_error is None else f"{verdict.median_error:.1%}"
    console.print(
        f"median error {error} on percentiles (mark {GOOD_ERROR:.0%}), "
        f"{verdict.median_points:.1f} points on attainment (mark {GOOD_POINTS:g}); wrote {args.output}",
        markup=False,
        highlight=False,
    )
    return 0 if verdict.inside else 1


def _profile(path: Path, model: str) -> Profile:
    profile = load_profile(path)
    if profile.serving == ServingCost():
        raise ConfigError(
            f"the profile {path} does not say what serving and hand-offs cost; make one with "
            "`diphase profile` and without --engine-only"
        )
    if profile.engine.model != model:
        raise ConfigError(
            f"the profile {path} is of the model {profile.engine.model}, not of {model}; "
            f"make one with `diphase profile --model {model}`"
        )
    return profile


def _slo(args: argparse.Namespace, default: Slo) -> Slo:
    return replace(
        default,
        ttft_ms=default.ttft_ms if args.ttft_ms is None else args.ttft_ms,
        tpot_ms=default.tpot_ms if args.tpot_ms is None else args.tpot_ms,
    )


def rates_of(result: SimResult) -> list[float]:
    """Shares of what was served of a queue that never empties; what it had no room for was not.

    Raises:
        ConfigError: nothing was.
    """
    served = sum(map(math.isfinite, result.ttft_ms))
    if not served:
        raise ConfigError("the simulated cluster serves no request of the workload; give shorter ones")
    return [round(share * served / result.duration_s, 3) for share in SHARES]


def rates_from(text: str) -> list[float]:
    """
    Raises:
        ConfigError: it is no list of rates.
    """
    try:
        rates = [float(word) for word in text.split(",") if word.strip()]
    except ValueError:
        raise ConfigError(f"--rates {text!r} is no list of numbers such as 0.5,1,2") from None
    if any(not 0.0 < rate < 1e6 for rate in rates):
        raise ConfigError(f"--rates {text}: use requests a second above 0 and below a million")
    return rates


@dataclass(slots=True, kw_only=True)
class _Task:
    """One placement and one workload, at any rate."""

    machine: OneMachine
    profile: Profile
    workload: WorkloadConfig
    records: Sequence[TraceRecord]
    slo: Slo
    probe: SpeedProbe

    def rates(self) -> list[float]:
        """Shares of the rate at which the simulation serves a queue that never empties."""
        arrivals = self._arrivals(ALL_AT_ONCE)
        return rates_of(self._predict(arrivals, self._speed()))

    async def validate(self, rates: Sequence[float], console: Console) -> list[Validation]:
        """One cluster, one run a rate."""
        validations = []
        with tempfile.TemporaryDirectory(prefix="diphase-validate-") as folder:
            async with self.machine.serving(Path(folder) / "serve.log") as (stub, shape):
                client = LoadClient(
                    stub,
                    slo=self.slo,
                    timeout_s=REQUEST_S,
                    timer=LoopTimer(),
                    token=self.machine.config.security.cluster_token,
                )
                await self._warm_up(client, shape)
                for i, rate in enumerate(rates):
                    found = await self._at(rate, client, shape, i + 1)
                    console.print(table_of(found))
                    validations.append(found)
        return validations

    async def _at(self, rate: float, client: LoadClient, shape: ModelShape, salt: int) -> Validation:
        """One rate, in parts: the speed of a shared machine changes within seconds, and is measured
        between them."""
        plan = plan_load(self.workload, self.records, shape, rate, salt)
        arrivals = self._arrivals(rate)
        speeds = [self._speed()]
        served: list[RequestResult] = []
        simulated: list[SimResult] = []
        for part in parts(len(plan)):
            begins = plan[part.start].arrival_s
            requests = [replace(r, arrival_s=r.arrival_s - begins) for r in plan[part]]
            served += await client.run_open_loop(requests)
            speeds.append(self._speed())
            expected = [replace(a, arrival_s=a.arrival_s - begins) for a in arrivals[part]]
            simulated.append(self._predict(expected, between(speeds[-2:])))
        return Validation(
            rate=rate,
            requests=len(plan),
            measured=self._measured(served),
            predicted=figures_of_simulation(simulated, self.slo),
            slower=between(speeds),
        )

    def _arrivals(self, rate: float) -> list[Arrival]:
        return plan_arrivals(self.workload, self.records, self.profile.engine.context_length, rate)

    def _speed(self) -> Slower:
        return self.probe.slower_than(self.profile)

    def _predict(self, arrivals: Sequence[Arrival], slower: Slower) -> SimResult:
        """With the profile's steps so many times longer."""
        now = replace(self.profile, step_time=self.profile.step_time.slowed(*slower))
        return predict(self.machine.config, now, arrivals, self.slo)

    async def _warm_up(self, client: LoadClient, shape: ModelShape) -> None:
        plan = plan_load(self.workload, self.records, shape, 1.0, 0)
        await client.run_one_by_one(plan[:WARM_UP])

    def _measured(self, results: Sequence[RequestResult]) -> Figures:
        """
        Raises:
            InternalError: some requests failed: that is no measurement.
        """
        failed = Counter(r.detail for r in results if r.outcome is Outcome.FAILED)
        if failed:
            raise InternalError(f"requests failed: {dict(failed)}")
        return figures_of(
            [r.ttft_ms for r in results if r.ttft_ms is not None],
            [r.tpot_ms for r in results if r.tpot_ms is not None],
            [parts_of(r) for r in results if r.ttft_ms is not None],
            sum(judge(r, self.slo) is SloVerdict.MET for r in results),
            len(results),
        )


def parts(count: int) -> list[slice]:
    """Of so many requests, about PART each."""
    number = max(1, round(count / PART))
    ends = [round(i * count / number) for i in range(number + 1)]
    return [slice(begin, end) for begin, end in pairwise(ends)]


def parts_of(result: RequestResult) -> Parts:
    """Of a request that had a first token."""
    assert result.ttft_ms is not None
    queue, prefill = result.stages["prefill_queue_ms"], result.stages["prefill_ms"]
    return Parts(queue, prefill, result.ttft_ms - queue - prefill)


def table_of(validation: Validation) -> Table:
    """One rate for the terminal."""
    busy = validation.predicted.busy or {}
    shares = ", ".join(f"{role} {share:.0%}" for role, share in busy.items())
    table = Table(
        "",
        "measured",
        "predicted",
        "error",
        title=f"{validation.requests} requests at {validation.rate:.3g}/s; predicted busy: {shares}; steps "
        f"take {validation.slower[0]:.2f} (prompts) and {validation.slower[1]:.2f} (tokens) times "
        "the profile's",
        title_justify="left",
    )
    errors = validation.errors
    for label, name in (("TTFT", "ttft_ms"), ("TPOT", "tpot_ms")):
        measured, predicted = getattr(validation.measured, name), getattr(validation.predicted, name)
        for p in (f"p{p}" for p in PERCENTILES):
            error = errors.get(f"{name}_{p}")
            table.add_row(
                f"{label} {p} ms",
                f"{measured[p]:.1f}" if measured else "–",
                f"{predicted[p]:.1f}" if predicted else "–",
                "–" if error is None else f"{error:+.1%}",
            )
    for part, label in (("queue", "waits"), ("prefill", "computed"), ("around", "around both")):
        measured_ms, predicted_ms = (
            side.parts_ms.get(part, math.nan) for side in (validation.measured, validation.predicted)
        )
        table.add_row(f"prompt {label}, median ms", f"{measured_ms:.1f}", f"{predicted_ms:.1f}", "")
    table.add_row(
        "met both",
        f"{validation.measured.attainment:.1%}",
        f"{validation.predicted.attainment:.1%}",
        f"{validation.attainment_points:+.1f} points",
    )
    return table
