"""The transports for GPUs between two processes: right, how fast, and beside what a plain device copy does.

Sections of benchmarks/gpu.py. Transfers of 32 MiB, made of pieces that are neighbours or lie scattered in
the pool, several in flight; speeds count the bytes that arrive, also of the copy beside them. cuda_ipc goes
to a second GPU where there is one, else to another process's pool on the same.
"""

from __future__ import annotations

import multiprocessing
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from diphase.kernels.copy_runs_triton import copy_runs_triton
from diphase.kv_transfer.base import Done, Failed, Region, Segments, Transport, TransportContext
from diphase.kv_transfer.transports.cuda_ipc import CudaIpcTransport
from diphase.kv_transfer.transports.cuda_memory import CudaPool
from diphase.kv_transfer.transports.nccl import NcclTransport
from diphase.proto.clock import MonotonicClock

KIB, MIB = 1024, 1024 * 1024
PROGRAMS = (8, 20, 64, 132, 264)
PATIENCE_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much is moved."""

    pool_bytes: int = 512 * MIB
    transfer_bytes: int = 32 * MIB
    pieces: tuple[int, ...] = (16 * KIB, 64 * KIB, 256 * KIB, MIB, 4 * MIB, 32 * MIB)
    transfers: int = 64
    """In one measurement."""
    depth: int = 4
    """Transfers in flight."""
    rounds: int = 5


@dataclass(slots=True)
class End:
    """A transport with one region, and what it has said."""

    transport: Transport
    pool: torch.Tensor
    """[pool_bytes] uint8: the region."""
    woken: threading.Event
    done: int = 0

    def take(self) -> None:
        """
        Raises:
            RuntimeError: a transfer failed.
        """
        for event in self.transport.poll(4096):
            if isinstance(event, Failed):
                raise RuntimeError(f"a transfer failed: {event}")
            self.done += isinstance(event, Done)

    def until(self, done: int) -> None:
        """
        Raises:
            RuntimeError: it took too long, or a transfer failed.
        """
        limit = time.monotonic() + PATIENCE_S
        while self.done < done:
            if time.monotonic() > limit:
                raise RuntimeError(f"waited in vain: {self.done} of {done} transfers are done")
            self.woken.wait(0.1)
            self.woken.clear()
            self.take()


MakeEnd = Callable[[str, int], End]
"""Of an incarnation, and the bytes of its pool."""


def make_end(
    incarnation: str, region: Region, pool: torch.Tensor, make: Callable[[TransportContext], Transport]
) -> End:
    woken = threading.Event()
    transport = make(TransportContext(incarnation=incarnation, wake=woken.set, clock=MonotonicClock()))
    transport.register(region)
    return End(transport, pool, woken)


def on_gpu(incarnation: str, pool_bytes: int, make: Callable[[TransportContext], Transport]) -> End:
    device = 1 if incarnation == "destination" and torch.cuda.device_count() > 1 else 0
    pool = CudaPool(device, pool_bytes)
    return make_end(incarnation, pool.region, torch.as_tensor(pool, device=f"cuda:{device}"), make)


def cuda_ipc_end(incarnation: str, pool_bytes: int) -> End:
    return on_gpu(incarnation, pool_bytes, CudaIpcTransport)


def nccl_end(incarnation: str, pool_bytes: int) -> End:
    return on_gpu(incarnation, pool_bytes, NcclTransport)


def cuda_ipc() -> dict[str, Any]:
    return {
        **measure(cuda_ipc_end, Size()),
        "devices": min(2, torch.cuda.device_count()),
        "copy_kernel": [copy_kernel(num_programs) for num_programs in PROGRAMS],
    }


def nccl() -> dict[str, Any]:
    if torch.cuda.device_count() < 2:
        return {"skipped": "NCCL needs two GPUs: it takes none twice"}
    return measure(nccl_end, Size())


def measure(make: MakeEnd, size: Size) -> dict[str, Any]:
    """
    Raises:
        RuntimeError: bytes went wrong, or a transfer failed.
    """
    context = multiprocessing.get_context("spawn")
    near, far = context.Pipe()
    process = context.Process(target=destination, args=(far, make, size.pool_bytes), daemon=True)
    process.start()
    far.close()  # its end is the other process's alone: when that dies, recv() says so
    source = make("source", size.pool_bytes)
    try:
        source.transport.connect(near.recv(), PATIENCE_S)
        check(source, near, size)
        plain = plain_copy(source.pool, size)
        runs = []
        for piece in size.pieces:
            for scattered in (False, True):
                if scattered and piece == size.transfer_bytes:
                    continue
                tables = plan(piece, scattered, size)
                times = [move(source, tables, size.depth) for _ in range(size.rounds)]
                gb_s = size.transfers * size.transfer_bytes / min(times) / 1e9
                runs.append(
                    {
                        "piece_bytes": piece,
                        "scattered": scattered,
                        "gb_s": round(gb_s, 2),
                        "to_plain_copy": round(gb_s / plain, 3),
                    }
                )
        return {"bytes_are_right": True, "plain_copy_gb_s": round(plain, 2), "runs": runs, **latency(source)}
    finally:
        source.transport.close()
        near.send(("end", None))
        process.join(PATIENCE_S)


def destination(pipe: Connection, make: MakeEnd, pool_bytes: int) -> None:
    """The other process: takes what comes, fills its pool when asked to, and says whether it equals another.
    Notices are collected now and then, as by a busy event loop."""
    end = make("destination", pool_bytes)
    end.transport.admit("source")
    pipe.send(end.transport.endpoint())
    while True:
        while not pipe.poll(0.005):
            end.take()
        what, value = pipe.recv()
        if what == "end":
            break
        if what == "fill":
            end.pool.fill_(value)
            synchronize(end.pool)
            pipe.send(True)
        else:
            pipe.send(bool((end.pool.cpu().numpy() == value).all()))
    end.transport.close()


def check(source: End, far: Connection, size: Size) -> None:
    """Pieces of many lengths from random places to random places.

    Raises:
        RuntimeError: a byte is wrong.
    """
    rng = np.random.default_rng(1)
    data = rng.integers(0, 256, size.pool_bytes, dtype=np.uint8)
    source.pool.copy_(torch.from_numpy(data))
    synchronize(source.pool)
    ask(far, "fill", 0)
    wanted = np.zeros_like(data)
    slot = 48 * KIB
    for longest in (1, 77, 4096, 16 * KIB, slot):
        places = np.stack([rng.permutation(size.pool_bytes // slot)[:64] for _ in range(2)]) * slot
        lengths = np.asarray(rng.integers(1, longest + 1, places.shape[1]))
        lengths[::2] = longest
        segments = np.zeros((places.shape[1], 5), dtype=np.int64)
        segments[:, 1], segments[:, 3], segments[:, 4] = places[0], places[1], lengths
        for begin, to, length in segments[:, (1, 3, 4)].tolist():
            wanted[to : to + length] = data[begin : begin + length]
        source.transport.write("destination", segments, b"check", PATIENCE_S)
    source.until(done=source.done + 5)
    if not ask(far, "equals", wanted):
        raise RuntimeError("the destination's pool is not what was written")


def plan(piece: int, scattered: bool, size: Size) -> list[Segments]:
    """Transfers of pieces, each another part of the pool."""
    rng = np.random.default_rng(piece)
    pieces = size.transfer_bytes // piece
    per_pool = size.pool_bytes // piece
    tables = []
    for i in range(size.transfers):
        table = np.zeros((pieces, 5), dtype=np.int64)
        neighbours = (np.arange(pieces) + i * pieces) % per_pool
        for column in (1, 3):
            table[:, column] = (rng.permutation(per_pool)[:pieces] if scattered else neighbours) * piece
        table[:, 4] = piece
        tables.append(table)
    return tables


def move(source: End, tables: list[Segments], depth: int) -> float:
    """Seconds until the last transfer is done, which is when the other process has it."""
    begin, first, sent = time.perf_counter(), source.done, 0
    while source.done < first + len(tables):
        while sent < len(tables) and sent - (source.done - first) < depth:
            source.transport.write("destination", tables[sent], b"moved", PATIENCE_S)
            sent += 1
        source.until(done=source.done + 1)
    return time.perf_counter() - begin


def latency(source: End) -> dict[str, float]:
    """One small transfer after the other, from the call to its Done."""
    table = np.array([[0, 0, 0, 0, 16 * KIB]], dtype=np.int64)
    times = []
    for _ in range(200):
        begin = time.perf_counter()
        source.transport.write("destination", table, b"one", PATIENCE_S)
        source.until(done=source.done + 1)
        times.append(time.perf_counter() - begin)
    return {"one_16_kib_median_us": round(statistics.median(times) * 1e6, 1)}


def plain_copy(pool: torch.Tensor, size: Size) -> float:
    """GB/s of one device copy after the other within this process."""
    halves = pool[: 2 * size.transfer_bytes].view(2, -1)
    best = 0.0
    for _ in range(size.rounds):
        synchronize(pool)
        begin = time.perf_counter()
        for _ in range(size.transfers):
            halves[1].copy_(halves[0], non_blocking=True)
        synchronize(pool)
        best = max(best, size.transfers * size.transfer_bytes / (time.perf_counter() - begin) / 1e9)
    return best


def copy_kernel(num_programs: int) -> dict[str, Any]:
    """The kernel by itself: 2,048 runs of 16 KiB within one pool."""
    pool = torch.zeros(256 * MIB, dtype=torch.uint8, device="cuda:0")
    places = np.random.default_rng(2).permutation(pool.numel() // 2 // (16 * KIB))[:2048] * 16 * KIB
    runs = np.full((2048, 3), 16 * KIB, dtype=np.int64)
    runs[:, 0] = pool.data_ptr() + places
    runs[:, 1] = pool.data_ptr() + pool.numel() // 2 + places[::-1]
    times = []
    for _ in range(6):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        for _ in range(8):
            copy_runs_triton(runs, "cuda:0", num_programs=num_programs)
        end.record()
        torch.cuda.synchronize()
        times.append(float(begin.elapsed_time(end)))
    gb_s = 8 * 2048 * 16 * KIB / min(times[1:]) / 1e6
    return {"programs": num_programs, "gb_s": round(gb_s, 1)}


def ask(far: Connection, what: str, value: Any) -> bool:
    """
    Raises:
        RuntimeError: the other process does not answer.
    """
    far.send((what, value))
    if not far.poll(2 * PATIENCE_S):
        raise RuntimeError("the destination does not answer")
    return bool(far.recv())


def synchronize(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
