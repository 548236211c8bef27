"""How fast the transports move KV bytes between two processes, beside what the machine can do.

Run `.venv/bin/python -P benchmarks/transport.py`. Transfers of 16 MiB, made of pieces of 16 KiB to 16 MiB
that are neighbours or scattered over the pool, go through each mover in turn: memcpy of the same pieces
between warm memfds, the same between anonymous memory, a raw sendmsg and recvmsg_into loop over a loopback
socket, the loops of other libraries where they are installed (transport_rivals.py), and the transports
("tcp:4" is tcp over four sockets). The ratios are the result, each of the best of
all rounds, since whatever else runs on the machine can only slow a round down; those of the medians stand
beside them. Then transfers of one small piece, one at a time and several in flight, and what an idle
connected transport costs. Writes docs/results/transport.json.
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diphase.benchmarks import harness
from diphase.benchmarks.transport_movers import (
    DEPTH,
    POOL_BYTES,
    Memcpy,
    Mover,
    RawSocket,
    Shape,
    Transfers,
    cpu_s,
)
from diphase.benchmarks.transport_rivals import rivals

KIB, MIB, GIB = 1024, 1024**2, 1024**3
TRANSFER_BYTES = 16 * MIB
PIECES = (16 * KIB, 64 * KIB, 256 * KIB, MIB, 4 * MIB, TRANSFER_BYTES)
SMALL = (1 * KIB, 16 * KIB, 256 * KIB)
"""Transfers of one piece."""
IDLE_S = 5.0
YARDSTICK = {
    "shm": ("memcpy", "memcpy_anonymous"),
    "tcp": ("socket", "nixl_loop_tcp", "mooncake"),
    "nixl": ("nixl_loop",),
}
"""What a transport is measured against, where it is there."""
RESULTS = Path(__file__).parents[1] / "docs" / "results" / "transport.json"


def movers(context: Any, names: list[str], yardsticks: list[str] | None) -> dict[str, Mover]:
    """The yardsticks first, then the transports. Of the yardsticks those named, None: all."""
    makers: dict[str, Callable[[], Mover]] = {
        "memcpy": lambda: Memcpy(shared=True),
        "memcpy_anonymous": lambda: Memcpy(shared=False),
        "socket": lambda: RawSocket(context),
        **rivals(context),
    }
    if yardsticks is not None:
        makers = {name: makers[name] for name in yardsticks}
    found = {}
    for name, make in makers.items():
        try:
            found[name] = make()
        except ImportError as error:
            print(f"{name} is left out: {error}", flush=True)
    found.update((name, Transfers(context, name)) for name in names)
    return found


def seconds(mover: Mover, shape: Shape, count: int) -> float:
    start = time.perf_counter()
    mover.move(shape, count)
    return time.perf_counter() - start


def first_touch(context: Any, names: list[str]) -> dict[str, float]:
    """GiB/s of the first transfers over the whole pool, whose pages this process has never touched there."""
    rates = {}
    shape = Shape(TRANSFER_BYTES, 4 * MIB, scattered=False)
    for name in names:
        mover = Transfers(context, name)
        rates[name] = POOL_BYTES / seconds(mover, shape, POOL_BYTES // TRANSFER_BYTES) / GIB
        mover.close()
    return rates


def idle(context: Any, names: list[str]) -> dict[str, float]:
    """Cores that both ends of an idle connection use together."""
    cores = {}
    for name in names:
        mover = Transfers(context, name)
        mover.move(Shape(TRANSFER_BYTES, MIB, scattered=False), 2)
        time.sleep(0.1)
        before = cpu_s(mover.pids())
        time.sleep(IDLE_S)
        cores[name] = (cpu_s(mover.pids()) - before) / IDLE_S
        mover.close()
    return cores


def sweep(found: dict[str, Mover], rounds: int, total: int) -> list[dict[str, Any]]:
    count = max(1, total // TRANSFER_BYTES)
    rows = []
    for scattered in (False, True):
        for piece in PIECES[: None if not scattered else -1]:
            shape = Shape(TRANSFER_BYTES, piece, scattered)
            samples: dict[str, list[float]] = {name: [] for name in found}
            for _ in range(rounds):
                for name, mover in found.items():
                    samples[name].append(count * TRANSFER_BYTES / seconds(mover, shape, count) / GIB)
            row: dict[str, Any] = {"piece_bytes": piece, "scattered": scattered}
            row["gib_s"] = {name: max(values) for name, values in samples.items()}
            row["median_gib_s"] = {name: statistics.median(values) for name, values in samples.items()}
            for key in ("gib_s", "median_gib_s"):
                ratios = {
                    f"{name}/{of}": row[key][name] / row[key][of]
                    for name in found
                    for of in YARDSTICK.get(name.partition(":")[0], ())
                    if of in found
                }
                row["ratio" if key == "gib_s" else "median_ratio"] = ratios
            rows.append(row)
            report(row)
    return rows


def report(row: dict[str, Any]) -> None:
    rates = "  ".join(f"{name} {rate:6.2f}" for name, rate in row["gib_s"].items())
    ratios = "  ".join(
        f"{name} {ratio:4.0%} ({row['median_ratio'][name]:4.0%})" for name, ratio in row["ratio"].items()
    )
    kind = "scattered " if row["scattered"] else "contiguous"
    print(f"{row['piece_bytes'] // KIB:>6} KiB {kind}  {rates} GiB/s   {ratios}", flush=True)


def scatter_cost(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Time of a transfer of scattered pieces of 16 KiB to that of one contiguous piece."""
    (one,) = [row for row in rows if row["piece_bytes"] == TRANSFER_BYTES]
    (many,) = [row for row in rows if row["piece_bytes"] == PIECES[0] and row["scattered"]]
    return {name: one["gib_s"][name] / many["gib_s"][name] for name in many["gib_s"]}


def overhead(found: dict[str, Mover], rounds: int) -> list[dict[str, Any]]:
    """Microseconds of a transfer of one piece."""
    rows = []
    for piece in SMALL:
        row: dict[str, Any] = {"piece_bytes": piece, "alone_us": {}, "in_flight_us": {}}
        shape, count = Shape(piece, piece, scattered=True), 500
        for name, mover in found.items():
            if isinstance(mover, Transfers):
                alone = []
                for _ in range(rounds):
                    start = time.perf_counter()
                    mover.move(shape, count, depth=1)
                    alone.append(time.perf_counter() - start)
                row["alone_us"][name] = min(alone) / count * 1e6
            row["in_flight_us"][name] = min(seconds(mover, shape, count) for _ in range(rounds)) / count * 1e6
        rows.append(row)
        print(f"one piece of {piece // KIB} KiB, us:", row["alone_us"], row["in_flight_us"], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--mib", type=int, default=128, help="moved in a round by each mover")
    parser.add_argument("--transports", nargs="+", default=["shm", "tcp", "nixl"])
    parser.add_argument("--yardsticks", nargs="*", help="of the others that move bytes, these; else all")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    context = mp.get_context("spawn")
    cold = first_touch(context, options.transports)
    resting = idle(context, options.transports)
    print("first touch, GiB/s:", cold, "\nidle, cores:", resting, flush=True)
    found = movers(context, options.transports, options.yardsticks)
    warm = Shape(TRANSFER_BYTES, TRANSFER_BYTES, scattered=False)
    for mover in found.values():
        mover.move(warm, POOL_BYTES // TRANSFER_BYTES)
    rows = sweep(found, options.rounds, options.mib * MIB)
    small = overhead(found, options.rounds)
    for mover in found.values():
        mover.close()
    cost = scatter_cost(rows)
    print("16 KiB scattered to one piece, time:", {name: f"{value:.2f}" for name, value in cost.items()})
    harness.write_result(
        options.output,
        {
            "kernel": platform.release(),
            "depth": DEPTH,
            "rounds": options.rounds,
            "transfer_bytes": TRANSFER_BYTES,
            "bytes_a_round": options.mib * MIB,
            "first_touch_gib_s": cold,
            "idle_cores": resting,
            "pieces": rows,
            "scattered_16_kib_to_one_piece_time": cost,
            "one_piece": small,
        },
    )


if __name__ == "__main__":
    main()
