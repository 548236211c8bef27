"""`diphase plan`: the placement that serves a workload best within its objectives, and why."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from ...proto.errors import ConfigError
from ...router.config import POLICIES
from ..load.report import write_json
from ..load.trace_formats import TraceRecord
from ..load.traces import TRACES, data_folder, load_trace
from ..load.workload import Arrivals, WorkloadConfig
from .failure_study import DEFAULT_AWAY_S, check_away
from .fleet_options import add_fleet_arguments, budget_of, gpu_types, total_gpus, wants_fleet
from .fleet_search import FleetTask
from .goodput import MOST_REQUESTS, ROUTER, Objectives
from .log_fit import fit_log, nearest, public_fits, sentence, synthetic
from .machines import Machine
from .plan_processes import processes_for
from .plan_report import Plan, as_json, draw, text
from .plan_toml import plan_toml
from .planning import SEARCH, make_plan
from .search import Task
from .search_distserve import ALGORITHMS
from .sim_workload import LEAST_REQUESTS, SimWorkload, Workload
from .step_time_sources import add_source_arguments, machine_from, source_json

FIXED = "fixed"
MOST_SEEDS = 10
MIN_REQUESTS = 20
MOST_PROCESSES = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `diphase plan` on a (sub)parser."""
    _add_task(parser.add_argument_group("what is planned"))
    add_fleet_arguments(parser)
    _add_workload(parser.add_argument_group("workload"))
    where = parser.add_argument_group("where")
    where.add_argument("--output", metavar="DIR", help="write plan.json, plan.png and cluster.toml there")
    where.add_argument(
        "--processes", type=int, metavar="N", help="simulate in so many (default: the machine's cores)"
    )


def _add_task(what: argparse._ArgumentGroup) -> None:
    add_source_arguments(what)
    what.add_argument(
        "--gpus",
        required=True,
        metavar="N",
        help="the most that may be used; of several types, of each, or as TYPE=N,TYPE=N; with a profile, "
        "slots for a worker each",
    )
    what.add_argument(
        "--slo", required=True, metavar="ttft=MS,tpot=MS", help="objectives in milliseconds, of 90 %%"
    )
    what.add_argument(
        "--rate", type=float, metavar="R", help="serve R requests/s with few GPUs (default: all that can be)"
    )
    what.add_argument(
        "--algorithm",
        choices=(SEARCH, *ALGORITHMS),
        default=SEARCH,
        help="what chooses: the search, or DistServe's for quick networks or slow ones (%(default)s)",
    )
    what.add_argument(
        "--policy",
        choices=[*POLICIES],
        default=ROUTER.policy,
        help="the router's, in simulations and in cluster.toml (%(default)s)",
    )
    what.add_argument(
        "--max-pp", type=int, metavar="N", default=1, help="most pipeline stages of a worker (%(default)s)"
    )


def _add_workload(load: argparse._ArgumentGroup) -> None:
    load.add_argument(
        "--workload",
        required=True,
        metavar="TRACE",
        help=f"lengths: {FIXED}, {', '.join(TRACES)}, or a .csv or .jsonl",
    )
    load.add_argument("--mean-input", type=int, metavar="N", help="mean prompt tokens (default: the trace's)")
    load.add_argument("--mean-output", type=int, metavar="N", help="mean completion tokens")
    load.add_argument(
        "--like",
        action="store_true",
        help="any number of requests like the log's: its pairs of lengths, gaps that vary as its own do",
    )
    load.add_argument("--arrivals", choices=[*Arrivals], help="default: poisson")
    load.add_argument("--cv", type=float, metavar="CV", help="burstiness of gamma arrivals (1)")
    load.add_argument("--context-length", type=int, metavar="N", help="scale lengths to fit so many tokens")
    load.add_argument(
        "--requests",
        type=int,
        default=LEAST_REQUESTS,
        metavar="N",
        help="of a simulation, at least; more where they live long (%(default)s)",
    )
    load.add_argument("--seed", type=int, default=0, metavar="N", help="the first (%(default)s)")
    load.add_argument(
        "--seeds", type=int, default=3, metavar="N", help="how many the interval is over (%(default)s)"
    )
    load.add_argument(
        "--data", metavar="DIR", help="folder of the traces (DIPHASE_DATA, else ../shared/data)"
    )
    load.add_argument(
        "--outage",
        type=float,
        default=DEFAULT_AWAY_S,
        metavar="S",
        help="say what the loss of a worker comes to that is back after S seconds; 0: do not (%(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Runs the command; the exit status, 1 when the objectives are infeasible or the rate out of reach.

    Raises:
        ConfigError: an option is wrong, or the model does not fit.
    """
    check_away(args.outage)
    task = fleet_task_from(args) if wants_fleet(args) else task_from(args)
    processes = _processes(args.processes)
    said = _sentence(args, task.workload)
    output = None if args.output is None else _folder(Path(args.output))
    console = Console()
    if said:
        console.print(f"workload: {said}", markup=False, highlight=False, soft_wrap=True)
    with processes_for(processes) as mapped:
        plan = replace(make_plan(task, args.algorithm, mapped, away_s=args.outage), workload=said)
    for line in text(plan):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if output is not None:
        wrote = f"wrote {', '.join(_write(plan, output, args))}"
        console.print(wrote, markup=False, highlight=False, soft_wrap=True)
    return 1 if plan.infeasible or not plan.found.reached else 0


def task_from(args: argparse.Namespace) -> Task:
    """The checked task, of one type of GPU.

    Raises:
        ConfigError: a value is malformed or out of range.
    """
    args = argparse.Namespace(**{**vars(args), "gpus": total_gpus(args)})
    folder = data_folder(args.data, os.environ)
    machine = machine_from(args, folder)
    return Task(
        machine=machine,
        workload=_workload(args, folder, machine),
        objectives=parse_slo(args.slo),
        gpus=args.gpus,
        rate=args.rate,
        max_pp=args.max_pp,
        seeds=tuple(range(args.seeds)),
        policy=args.policy,
    )


def fleet_task_from(args: argparse.Namespace) -> FleetTask:
    """The checked task, of several types or with a budget.

    Raises:
        ConfigError: a value is malformed or out of range.
    """
    if args.algorithm != SEARCH:
        raise ConfigError(f"--algorithm {args.algorithm} is for one type of GPU, without a --budget")
    folder = data_folder(args.data, os.environ)
    budget = budget_of(args.budget)

    def machine_of(name: str) -> Machine:
        return machine_from(argparse.Namespace(**{**vars(args), "hardware": name}), folder)

    types = gpu_types(args, machine_of)
    return FleetTask(
        types=types,
        workload=_workload(args, folder, types[0].machine),
        objectives=parse_slo(args.slo),
        budget=budget,
        rate=args.rate,
        max_pp=args.max_pp,
        seeds=tuple(range(args.seeds)),
        policy=args.policy,
    )


def _workload(args: argparse.Namespace, folder: Path, machine: Machine) -> SimWorkload:
    if not 1 <= args.seeds <= MOST_SEEDS:
        raise ConfigError(f"--seeds {args.seeds} is out of range; use 1 to {MOST_SEEDS}")
    if not MIN_REQUESTS <= args.requests <= MOST_REQUESTS:
        raise ConfigError(
            f"--requests {args.requests} is out of range; use {MIN_REQUESTS} to {MOST_REQUESTS}"
        )
    config, records = _load_from(args, folder)
    context_length = machine.limits.context_length if args.context_length is None else args.context_length
    workload = SimWorkload(
        config=replace(config, mean_input=args.mean_input, mean_output=args.mean_output),
        records=records,
        context_length=context_length,
        block_size=machine.limits.block_size,
    )
    if (most := workload.most(MIN_REQUESTS)) < MIN_REQUESTS:
        raise ConfigError(
            f"--workload {args.workload} has {most} requests to replay; a goodput needs {MIN_REQUESTS}"
        )
    return workload


def _load_from(args: argparse.Namespace, folder: Path) -> tuple[WorkloadConfig, Sequence[TraceRecord]]:
    """Arrivals and records, by --workload and --like."""
    fixed = args.workload == FIXED
    if fixed and (args.mean_input is None or args.mean_output is None):
        raise ConfigError(f"--workload {FIXED} needs --mean-input and --mean-output")
    records = [] if fixed else load_trace(args.workload, folder)
    if args.like:
        if fixed or args.arrivals is not None or args.cv is not None:
            raise ConfigError(
                "--like takes lengths and the variation of the gaps from a log; "
                f"leave out --arrivals and --cv, and name a log instead of {FIXED}"
            )
        return synthetic(fit_log(records), records, num_requests=args.requests, seed=args.seed)
    config = WorkloadConfig(
        num_requests=args.requests,
        arrivals=Arrivals(args.arrivals or Arrivals.POISSON),
        cv=1.0 if args.cv is None else args.cv,
        seed=args.seed,
    )
    return config, records


def _sentence(args: argparse.Namespace, workload: Workload) -> str:
    """What the log is like, and of one's own which public trace is nearest."""
    records = workload.records if isinstance(workload, SimWorkload) else ()
    if len(records) < 2:
        return ""
    fit = fit_log(records)
    if args.workload in TRACES:
        return sentence(fit)
    try:
        return sentence(fit, nearest(fit, public_fits(data_folder(args.data, os.environ))))
    except ConfigError as exc:
        return f"{sentence(fit)}; {exc.message}"


def parse_slo(given: str) -> Objectives:
    """Objectives written as "ttft=400,tpot=40".

    Raises:
        ConfigError: one is missing, unknown or no number above 0.
    """
    values: dict[str, float] = {}
    for part in given.split(","):
        name, _, value = part.strip().partition("=")
        if name not in ("ttft", "tpot") or name in values:
            raise ConfigError(f"--slo {given}: write it as ttft=400,tpot=40, in milliseconds")
        try:
            values[name] = float(value)
        except ValueError:
            raise ConfigError(f"--slo {given}: {name} = {value!r} is no number of milliseconds") from None
    if len(values) < 2:
        raise ConfigError(f"--slo {given}: give both, as in ttft=400,tpot=40")
    if not all(0.0 < value < 3.6e6 for value in values.values()):
        raise ConfigError(f"--slo {given}: objectives are above 0 and below an hour, in milliseconds")
    return Objectives(ttft_ms=values["ttft"], tpot_ms=values["tpot"])


def _processes(given: int | None) -> int:
    if given is None:
        return min(MOST_PROCESSES, os.cpu_count() or 1)
    if not 1 <= given <= 1024:
        raise ConfigError(f"--processes {given} is out of range; use 1 to 1024")
    return given


def _folder(path: Path) -> Path:
    """Before the search, which may take minutes, rather than after it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise ConfigError(f"--output {path} cannot be made: {exc.strerror or exc}") from exc
    return path


def _write(plan: Plan, folder: Path, args: argparse.Namespace) -> list[str]:
    """The files, and what is said of those that cannot be."""
    written = [str(folder / "plan.json")]
    write_json(folder / "plan.json", source_json(args) | as_json(plan))
    if plan.infeasible:
        return written
    draw(folder / "plan.png", plan)
    written.append(str(folder / "plan.png"))
    task = plan.task
    try:
        toml = plan_toml(plan.best.placement, task.machines, task.objectives, args.model, task.policy)
    except ConfigError as exc:
        return [*written, f"no cluster.toml: {exc.message}"]
    (folder / "cluster.toml").write_text(toml, encoding="utf-8")
    return [*written, str(folder / "cluster.toml")]
