"""`diphase profile`: measures the engine of this machine and what serving adds, and writes a file for the
planner.

Minutes: a grid of steps on one engine, then what a second engine beside it costs, then a cluster of one
prefill and one decode worker for the hand-off and for what gateway and worker add. torch is loaded by the
command itself, not with this module.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ..engine.base import Engine
from ..engine.config import EngineConfig
from ..engine.neighbour import neighbour
from ..engine.profiler import IDLE, CellTimes, make_grid, profile_slowdowns, profile_steps
from ..proto.clock import MonotonicClock
from ..proto.errors import ConfigError
from ..proto.slo import Slo
from ..router.step_time import StepShape, StepTime
from .config import ClusterConfig
from .load.client import LoadClient, LoopTimer
from .load.report import check_output, environment, write_json
from .machine_speed import between, small_engine, speed_probe
from .one_machine import OneMachine, cores, cores_of_worker
from .planner.profile import ALONE, EngineFacts, Profile, ServingCost, Slowdown, make_profile
from .planner.profile_fit import StepCell
from .serving_cost import cost_of, serve_rounds, slowdown_of

OUTPUT = "diphase-profile.json"
SLOWDOWN_ROUNDS = 4
MOST_ROUNDS = 100
"""A median of more runs is no better; each round takes the engine through all kinds of steps."""
REQUEST_S = 300.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `diphase profile`."""
    parser.add_argument("--model", metavar="NAME", help="as model.name (default: as configured)")
    parser.add_argument("--output", type=Path, default=Path(OUTPUT), metavar="FILE", help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="over the grid (%(default)s)")
    parser.add_argument(
        "--engine-only",
        action="store_true",
        help="no cluster: leave out what serving and hand-offs add, which plan and validate need",
    )


def run(args: argparse.Namespace) -> int:
    """Runs the command; the exit status.

    Raises:
        ConfigError: an option is wrong, or the pool is too small.
        InternalError: the second engine or the cluster failed.
    """
    if not 2 <= args.rounds <= MOST_ROUNDS:
        raise ConfigError(f"--rounds {args.rounds} is out of range; use 2 to {MOST_ROUNDS}")
    check_output(args.output)
    console = Console()
    machine = OneMachine(args, "1p1d", "router.local_prefill_tokens=0")
    if any(pool.tensor_parallel > 1 for pool in machine.config.pools.placements().values()):
        raise ConfigError("profiles are of workers of one process; leave tensor_parallel at 1")
    profile = profile_engine(machine.config, args.rounds, console)
    if not args.engine_only:
        console.print("a cluster of one prefill and one decode worker …", highlight=False)
        profile = asyncio.run(_with_serving(machine, profile))
    write_json(args.output, profile.to_dict())
    show(profile, console)
    console.print(f"wrote {args.output}", markup=False, highlight=False)
    return 0


def profile_engine(config: ClusterConfig, rounds: int, console: Console) -> Profile:
    """Loads the engine on the cores of a worker and profiles it, alone and beside another.

    Raises:
        ConfigError: the pool is too small for a grid.
        InternalError: the second engine failed.
    """
    threads = config.engine.threads
    own = cores_of_worker(0, threads)
    enough = len(cores()) >= 2 * threads
    engine_config = replace(config.engine, model=config.model.name, dtype=config.model.dtype)
    # As a worker's process has them (actors.py); read when torch is loaded.
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ["OMP_WAIT_POLICY"] = "passive"
    there, beside = os.sched_getaffinity(0), cores_of_worker(1, threads)
    if enough:
        os.sched_setaffinity(0, own)
    try:
        from ..engine.engine import TorchEngine

        engine = TorchEngine.load(engine_config)
        try:
            cells = profile_grid(engine, config, rounds, console)
            slowdown = _slowdown(engine, small_engine(config), beside, console) if enough else ALONE
            facts = facts_of(engine, engine_config)
        finally:
            engine.close()
    finally:
        os.sched_setaffinity(0, there)
    return make_profile(facts, environment(), [_step_cell(cell) for cell in cells], slowdown)


def profile_grid(engine: Engine, config: ClusterConfig, rounds: int, console: Console) -> list[CellTimes]:
    """The steps that the configuration's schedulers make."""
    pools = config.pools
    schedulers = (pools.decode.scheduler, pools.colocated.scheduler)
    grid = make_grid(
        chunk_budget=max(pools.prefill.scheduler.chunk_budget, *(s.prefill_budget for s in schedulers)),
        max_running=max(s.max_running for s in schedulers),
        num_blocks=engine.num_blocks,
        block_size=engine.layout.block_size,
        context_length=engine.limits.context_length,
    )
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task(f"{len(grid)} kinds of steps", total=rounds + 1)
        return profile_steps(
            engine,
            grid,
            rounds=rounds,
            clock=MonotonicClock(),
            on_round=lambda _: progress.advance(bar),
        )


def facts_of(engine: Engine, config: EngineConfig) -> EngineFacts:
    layout = engine.layout
    return EngineFacts(
        model=config.model,
        dtype=config.dtype,
        block_size=layout.block_size,
        kv_cache_mib=config.kv_cache_mib,
        threads=config.threads,
        num_blocks=engine.num_blocks,
        block_bytes=layout.block_bytes,
        num_layers=layout.num_layers,
        context_length=engine.limits.context_length,
    )


def _slowdown(engine: Engine, config: EngineConfig, beside: list[int], console: Console) -> Slowdown:
    with console.status("beside a second engine"), neighbour(config, beside) as other:
        other.tell(IDLE)
        factors = profile_slowdowns(engine, other.tell, rounds=SLOWDOWN_ROUNDS, clock=MonotonicClock())
    return Slowdown(factors=factors)


async def _with_serving(machine: OneMachine, profile: Profile) -> Profile:
    with tempfile.TemporaryDirectory(prefix="diphase-profile-") as folder:
        async with machine.serving(Path(folder) / "serve.log") as (stub, shape):
            client = LoadClient(
                stub,
                slo=Slo(),
                timeout_s=REQUEST_S,
                timer=LoopTimer(),
                token=machine.config.security.cluster_token,
            )
            budget = machine.config.pools.prefill.scheduler.chunk_budget
            with speed_probe(machine.config) as probe:
                speeds = [probe.slower_than(profile)]

                def speed() -> StepTime:
                    speeds.append(probe.slower_than(profile))
                    return profile.step_time.slowed(*between(speeds[-2:]))

                rounds = await serve_rounds(client, shape, speed, chunk_budget=budget)
    return replace(profile, serving=cost_of(rounds), slowdown=slowdown_of(rounds, profile.slowdown))


def _step_cell(cell: CellTimes) -> StepCell:
    return StepCell(shape=StepShape.of(cell.sample), seconds=tuple(cell.seconds))


def show(profile: Profile, console: Console) -> None:
    """The fit's errors by cell and by kind, and what else was found."""
    table = Table(
        "step", "tokens", "context", "batch", "context", "ms", "fit", "held out", title="steps, alone"
    )
    for cell in profile.cells:
        shape = cell.shape
        words = (shape.prefill_tokens, shape.prefill_context, shape.decode_batch, shape.decode_context)
        table.add_row(
            cell.kind,
            *(f"{word:.0f}" if word else "" for word in words),
            f"{cell.median_s * 1000.0:.1f}",
            f"{cell.error:+.1%}",
            f"{cell.hold_out_error:+.1%}",
        )
    console.print(table)
    for kind in dict.fromkeys(cell.kind for cell in profile.cells):
        errors = profile.errors(kind)
        console.print(
            f"{kind}: error median {errors.median:.1%}, worst {errors.worst:.1%}; "
            f"held out median {errors.hold_out_median:.1%}, worst {errors.hold_out_worst:.1%}",
            highlight=False,
        )
    step_time = profile.step_time
    for kind, regimes, unit in (
        ("prefill", step_time.prefill, "tokens"),
        ("decode", step_time.decode, "sequences"),
        ("mixed", step_time.mixed, "tokens"),
    ):
        if regimes.boundary:
            console.print(f"{kind}: other terms from {regimes.boundary} {unit} on", highlight=False)
    terms = profile.coefficients
    console.print(
        f"all steps by one set of terms: {terms.base * 1e3:.2f} ms, {terms.per_prefill_token * 1e6:.1f} µs a "
        f"prompt token, {terms.per_prefill_context * 1e9:.2f} ns a unit of prompt context, "
        f"{terms.per_sequence * 1e6:.0f} µs a sequence, {terms.per_decode_context * 1e6:.2f} µs a token of "
        "their context",
        highlight=False,
    )
    console.print(
        f"KV: {profile.engine.num_blocks} blocks of {profile.engine.block_bytes} bytes", highlight=False
    )
    for own, factors in profile.slowdown.factors.items():
        beside = ", ".join(f"{factor:.2f} beside {kind}" for kind, factor in factors.items())
        console.print(f"{own} takes times {beside}", highlight=False)
    serving = profile.serving
    if serving == ServingCost():
        console.print("serving and hand-offs: not measured; plan and validate need them", highlight=False)
        return
    console.print(
        f"serving adds {serving.first_token_s * 1000.0:.1f} ms to a first token "
        f"({serving.first_token_beside_s * 1000.0:.1f} while another worker computes) and "
        f"{serving.step_s * 1000.0:.2f} ms to a step, {serving.step_per_sequence_s * 1000.0:.3f} for each "
        f"sequence; a hand-off takes {serving.handoff_s * 1000.0:.1f} ms and its bytes at "
        f"{serving.handoff_bytes_per_s / 2**30:.2f} GiB/s",
        highlight=False,
    )
