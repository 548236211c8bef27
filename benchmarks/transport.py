"""How fast the transports move KV bytes between two processes, beside what the machine can do.

Run `.venv/bin/python -P benchmarks/transport.py`. For each piece size it measures, interleaved: memcpy into
warm shared memory, a raw loopback TCP socket (sendall against recv_into), and the transports shm and tcp. The
ratios are the result: shm to memcpy, tcp to the raw socket, each the best of all rounds, since whatever else
runs on the machine can only slow a round down. Writes docs/results/transport.json.
"""

from __future__ import annotations

import argparse
import mmap
import multiprocessing as mp
import os
import platform
import socket
import statistics
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from diphase.benchmarks import harness
from diphase.kv_transfer.base import Done, Failed, PeerDown, Region, TransportContext
from diphase.kv_transfer.registry import load_factory
from diphase.proto.clock import MonotonicClock

POOL_BYTES = 128 * 1024 * 1024
PIECES = (64 * 1024, 512 * 1024, 4 * 1024 * 1024, 16 * 1024 * 1024)
DEPTH = 8
"""Transfers in flight."""
RESULTS = Path(__file__).parents[1] / "docs" / "results" / "transport.json"
GIB = 1024**3


class End:
    """A transport with one region in a memfd, all pages touched."""

    def __init__(self, name: str, incarnation: str) -> None:
        self.woken = threading.Event()
        self.fd = os.memfd_create(incarnation)
        os.ftruncate(self.fd, POOL_BYTES)
        self.buffer = memoryview(mmap.mmap(self.fd, POOL_BYTES))
        np.frombuffer(self.buffer, dtype=np.uint8)[:] = 1
        self.transport = load_factory(name)(
            TransportContext(incarnation=incarnation, wake=self.woken.set, clock=MonotonicClock())
        )
        self.transport.register(Region(buffer=self.buffer, fd=self.fd))


def destination(pipe: Connection, name: str) -> None:
    """The other process: takes what comes until it is told to end."""
    if name == "socket":
        raw_destination(pipe)
        return
    end = End(name, "destination")
    end.transport.admit("source")
    pipe.send(end.transport.endpoint())
    # Notices are collected now and then, as by a busy event loop: measured are the transports' own threads.
    while not pipe.poll(0.005):
        end.transport.poll(4096)
    end.transport.close()


def raw_destination(pipe: Connection) -> None:
    """recv_into the same kind of memory, one byte back for each piece."""
    memory = memoryview(mmap.mmap(-1, POOL_BYTES))
    np.frombuffer(memory, dtype=np.uint8)[:] = 1
    with socket.create_server(("127.0.0.1", 0)) as listener:
        pipe.send(listener.getsockname())
        sock, _ = listener.accept()
        with sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while piece := int.from_bytes(sock.recv(8, socket.MSG_WAITALL), "little"):
                offset = 0
                for _ in range(int.from_bytes(sock.recv(8, socket.MSG_WAITALL), "little")):
                    offset = offset if offset + piece <= POOL_BYTES else 0
                    got = 0
                    while got < piece:
                        got += sock.recv_into(memory[offset + got : offset + piece])
                    offset += piece
                sock.sendall(b"!")


class Transfer:
    """One transport to the other process."""

    def __init__(self, context: Any, name: str) -> None:
        self.pipe, far = context.Pipe()
        self.process = context.Process(target=destination, args=(far, name), daemon=True)
        self.process.start()
        self.end = End(name, "source")
        self.peer = self.end.transport.connect(self.pipe.recv(), 10.0)

    def move(self, piece: int, count: int) -> None:
        """`count` pieces, DEPTH of them in flight; returns when all are acknowledged."""
        done = sent = 0
        per_pool = POOL_BYTES // piece
        while done < count:
            while sent < count and sent - done < DEPTH:
                offset = (sent % per_pool) * piece
                segments = np.array([[0, offset, 0, offset, piece]], dtype=np.int64)
                self.end.transport.write(self.peer, segments, b"piece", 30.0)
                sent += 1
            self.end.woken.wait(1.0)
            self.end.woken.clear()
            for event in self.end.transport.poll(4096):
                if isinstance(event, Failed | PeerDown):
                    raise SystemExit(f"a transfer failed: {event}")
                done += isinstance(event, Done)

    def close(self) -> None:
        self.pipe.send("end")
        self.process.join()
        self.end.transport.close()


class RawSocket:
    """sendall into a loopback socket."""

    def __init__(self, context: Any) -> None:
        self.pipe, far = context.Pipe()
        self.process = context.Process(target=destination, args=(far, "socket"), daemon=True)
        self.process.start()
        self.memory = memoryview(mmap.mmap(-1, POOL_BYTES))
        np.frombuffer(self.memory, dtype=np.uint8)[:] = 1
        self.sock = socket.create_connection(self.pipe.recv())
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def move(self, piece: int, count: int) -> None:
        self.sock.sendall(piece.to_bytes(8, "little") + count.to_bytes(8, "little"))
        offset = 0
        for _ in range(count):
            offset = offset if offset + piece <= POOL_BYTES else 0
            self.sock.sendall(self.memory[offset : offset + piece])
            offset += piece
        self.sock.recv(1)

    def close(self) -> None:
        self.sock.sendall(bytes(8))
        self.sock.close()
        self.process.join()


class Memcpy:
    """numpy copies between two warm pools of this process."""

    def __init__(self) -> None:
        self.source = np.ones(POOL_BYTES, dtype=np.uint8)
        fd = os.memfd_create("memcpy")
        os.ftruncate(fd, POOL_BYTES)
        self.target = np.frombuffer(mmap.mmap(fd, POOL_BYTES), dtype=np.uint8)
        os.close(fd)
        self.target[:] = 0

    def move(self, piece: int, count: int) -> None:
        per_pool = POOL_BYTES // piece
        for i in range(count):
            offset = (i % per_pool) * piece
            self.target[offset : offset + piece] = self.source[offset : offset + piece]

    def close(self) -> None:
        """Nothing is open."""


def rate(move: Callable[[int, int], None], piece: int, total: int) -> float:
    """GiB/s."""
    count = max(1, total // piece)
    start = time.perf_counter()
    move(piece, count)
    return count * piece / (time.perf_counter() - start) / GIB


def first_touch(context: Any) -> dict[str, float]:
    """GiB/s of the first transfer over the whole pool, whose pages the writer has never touched."""
    rates = {}
    for name in ("shm", "tcp"):
        transfer = Transfer(context, name)
        rates[name] = rate(transfer.move, PIECES[2], POOL_BYTES)
        transfer.close()
    return rates


def measure(rounds: int, total: int) -> dict[str, Any]:
    context = mp.get_context("spawn")
    cold = first_touch(context)
    movers: dict[str, Any] = {
        "memcpy": Memcpy(),
        "socket": RawSocket(context),
        "shm": Transfer(context, "shm"),
        "tcp": Transfer(context, "tcp"),
    }
    for mover in movers.values():
        mover.move(PIECES[-1], POOL_BYTES // PIECES[-1])  # touch every page
    rows = []
    for piece in PIECES:
        samples: dict[str, list[float]] = {name: [] for name in movers}
        for _ in range(rounds):
            for name, mover in movers.items():
                samples[name].append(rate(mover.move, piece, total))
        row: dict[str, Any] = {"piece_bytes": piece}
        row.update({f"{name}_gib_s": max(values) for name, values in samples.items()})
        row.update({f"{name}_median_gib_s": statistics.median(values) for name, values in samples.items()})
        for name, floor in (("shm", "memcpy"), ("tcp", "socket")):
            row[f"{name}_to_{floor}"] = max(samples[name]) / max(samples[floor])
        rows.append(row)
    for mover in movers.values():
        mover.close()
    return {
        "kernel": platform.release(),
        "depth": DEPTH,
        "rounds": rounds,
        "bytes_a_round": total,
        "first_touch_gib_s": cold,
        "pieces": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--mib", type=int, default=128, help="moved in a round, for each piece size and mover"
    )
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    result = measure(options.rounds, options.mib * 1024 * 1024)
    print(
        f"{'piece':>9}  {'memcpy':>7} {'shm':>7} {'ratio':>6}  {'socket':>7} {'tcp':>7} {'ratio':>6}   GiB/s"
    )
    for row in result["pieces"]:
        print(
            f"{row['piece_bytes'] // 1024:>5} KiB  {row['memcpy_gib_s']:7.2f} {row['shm_gib_s']:7.2f} "
            f"{row['shm_to_memcpy']:6.0%}  {row['socket_gib_s']:7.2f} {row['tcp_gib_s']:7.2f} "
            f"{row['tcp_to_socket']:6.0%}"
        )
    harness.write_result(options.output, result)


if __name__ == "__main__":
    main()
