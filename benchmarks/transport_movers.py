"""What benchmarks/transport.py lets move bytes: yardsticks made of system calls alone, and the transports.

A mover moves the transfers of a shape from one pool to another and returns when all have arrived. Other ways
to move bytes (a library's own loop, a rival's engine) become movers by having the same three methods.
"""

from __future__ import annotations

import mmap
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import Connection
from typing import Any, Protocol

import numpy as np
from diphase.kv_transfer.base import Done, Failed, PeerDown, Region, Segments, TransportContext
from diphase.kv_transfer.config import KvTransferConfig
from diphase.kv_transfer.registry import load_factory
from diphase.proto.clock import MonotonicClock

POOL_BYTES = 128 * 1024 * 1024
DEPTH = 4
"""Transfers in flight."""
MAX_VIEWS = 1024
"""What one sendmsg or recvmsg takes."""


@dataclass(frozen=True)
class Shape:
    """What one transfer looks like; the same in every process."""

    transfer_bytes: int
    piece_bytes: int
    scattered: bool

    @cache  # noqa: B019  (a handful of shapes, alive as long as the process)
    def tables(self) -> list[Segments]:
        """The transfers that cover a pool once: [n, 5] as base.Segments. Scattered pieces are shuffled over
        the whole pool at both ends; the others are neighbours at both."""
        count = POOL_BYTES // self.piece_bytes
        sources = targets = np.arange(count)
        if self.scattered:
            rng = np.random.default_rng(7)
            sources, targets = rng.permutation(count), rng.permutation(count)
        table = np.zeros((count, 5), dtype=np.int64)
        table[:, 1] = sources * self.piece_bytes
        table[:, 3] = targets * self.piece_bytes
        table[:, 4] = self.piece_bytes
        each = self.transfer_bytes // self.piece_bytes
        return [table[i : i + each].copy() for i in range(0, count, each)]


class Mover(Protocol):
    """One way to move bytes."""

    def move(self, shape: Shape, count: int) -> None:
        """`count` transfers, one after the other through the pool; returns when the last has arrived."""
        ...

    def pids(self) -> list[int]:
        """Other processes that it has."""
        ...

    def close(self) -> None: ...


class Pool:
    """A memfd as the engine has one, mapped, all pages touched. All movers of a run have the same two: where
    the kernel finds the pages of a memfd changes how fast they are copied (see docs/decisions.md)."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.memory = memoryview(mmap.mmap(fd, POOL_BYTES))
        np.frombuffer(self.memory, dtype=np.uint8)[:] = 1


@cache
def _memfds() -> tuple[int, int]:
    """Of this process: to read from and to write to."""
    found = []
    for name in ("source", "target"):
        found.append(os.memfd_create(name))
        os.ftruncate(found[-1], POOL_BYTES)
    return found[0], found[1]


def source_pool() -> Pool:
    return Pool(_memfds()[0])


def target_pool() -> Pool:
    return Pool(_memfds()[1])


class Memcpy:
    """numpy copies between two warm pools of this process: the memfds, or plain anonymous memory."""

    def __init__(self, shared: bool) -> None:
        if shared:
            self.source, self.target = (
                np.frombuffer(pool.memory, dtype=np.uint8) for pool in (source_pool(), target_pool())
            )
        else:
            self.source, self.target = (np.ones(POOL_BYTES, dtype=np.uint8) for _ in range(2))

    def move(self, shape: Shape, count: int) -> None:
        source, target, tables = self.source, self.target, shape.tables()
        for i in range(count):
            for _, a, _, b, n in tables[i % len(tables)].tolist():
                target[b : b + n] = source[a : a + n]

    def pids(self) -> list[int]:
        return []

    def close(self) -> None:
        """Nothing is open."""


class Far:
    """A mover's other process. Runs `target` with its end of a pipe, the pool to write to, and `args`."""

    def __init__(self, context: Any, target: Callable[..., None], *args: Any) -> None:
        self.pipe, far = context.Pipe()
        path = f"/proc/{os.getpid()}/fd/{_memfds()[1]}"
        self.process = context.Process(target=_run_far, args=(target, path, far, *args), daemon=True)
        self.process.start()


def _run_far(target: Callable[..., None], path: str, pipe: Connection, *args: Any) -> None:
    target(pipe, Pool(os.open(path, os.O_RDWR)), *args)


class RawSocket:
    """sendmsg into a loopback socket, recvmsg_into out of it, and nothing else: one byte comes back after the
    last transfer."""

    def __init__(self, context: Any) -> None:
        self.far = Far(context, raw_destination)
        self.memory = source_pool().memory
        self.sock = socket.create_connection(self.far.pipe.recv())
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def move(self, shape: Shape, count: int) -> None:
        self.far.pipe.send((shape, count))
        tables = shape.tables()
        for i in range(count):
            views = [self.memory[a : a + n] for _, a, _, _, n in tables[i % len(tables)].tolist()]
            run(views, self.sock.sendmsg)
        self.sock.recv(1)

    def pids(self) -> list[int]:
        return [self.far.process.pid]

    def close(self) -> None:
        self.far.pipe.send(None)
        self.sock.close()
        self.far.process.join()


def raw_destination(pipe: Connection, pool: Pool) -> None:
    memory = pool.memory
    with socket.create_server(("127.0.0.1", 0)) as listener:
        pipe.send(listener.getsockname())
        sock, _ = listener.accept()
        with sock:
            while job := pipe.recv():
                shape, count = job
                tables = shape.tables()
                for i in range(count):
                    views = [memory[b : b + n] for _, _, _, b, n in tables[i % len(tables)].tolist()]
                    run(
                        views,
                        lambda some: (
                            sock.recv_into(some[0]) if len(some) == 1 else sock.recvmsg_into(some)[0]
                        ),
                    )
                sock.sendall(b"!")


def run(views: list[memoryview], call: Callable[[list[memoryview]], int]) -> None:
    """Calls until every byte of `views` has gone through."""
    first = 0
    while first < len(views):
        done = call(views[first : first + MAX_VIEWS])
        while first < len(views) and done >= len(views[first]):
            done -= len(views[first])
            first += 1
        if done:
            views[first] = views[first][done:]


class End:
    """A transport with one pool. "tcp:4" is tcp over four sockets."""

    def __init__(self, name: str, incarnation: str, pool: Pool) -> None:
        self.woken = threading.Event()
        name, _, sockets = name.partition(":")
        context = TransportContext(
            incarnation=incarnation,
            wake=self.woken.set,
            clock=MonotonicClock(),
            tcp_sockets=int(sockets or KvTransferConfig().tcp_sockets),
        )
        self.transport = load_factory(name)(context)
        self.transport.register(Region(buffer=pool.memory, fd=pool.fd))


class Transfers:
    """One of our transports, to another process."""

    def __init__(self, context: Any, name: str) -> None:
        self.far = Far(context, destination, name)
        self.end = End(name, "source", source_pool())
        self.peer = self.end.transport.connect(self.far.pipe.recv(), 10.0)

    def move(self, shape: Shape, count: int, depth: int = DEPTH) -> None:
        tables, transport = shape.tables(), self.end.transport
        done = sent = 0
        while done < count:
            while sent < count and sent - done < depth:
                transport.write(self.peer, tables[sent % len(tables)], b"transfer", 60.0)
                sent += 1
            self.end.woken.wait(5.0)
            self.end.woken.clear()
            for event in transport.poll(4096):
                if isinstance(event, Failed | PeerDown):
                    raise SystemExit(f"a transfer failed: {event}")
                done += isinstance(event, Done)

    def pids(self) -> list[int]:
        return [self.far.process.pid]

    def close(self) -> None:
        self.far.pipe.send("end")
        self.far.process.join()
        self.end.transport.close()


def destination(pipe: Connection, pool: Pool, name: str) -> None:
    """Takes what comes until it is told to end."""
    end = End(name, "destination", pool)
    end.transport.admit("source")
    pipe.send(end.transport.endpoint())
    ended = threading.Event()

    def serve() -> None:
        while not ended.is_set():
            end.woken.wait()
            end.woken.clear()
            # As an event loop that is busy with other things: it looks now and then, not at each notice.
            ended.wait(0.002)
            end.transport.poll(4096)

    server = threading.Thread(target=serve)
    server.start()
    pipe.recv()
    ended.set()
    end.woken.set()
    server.join()
    end.transport.close()


def cpu_s(pids: list[int]) -> float:
    """Processor time so far of this process and others, seconds."""
    total = time.process_time()
    for pid in pids:
        with open(f"/proc/{pid}/stat", encoding="ascii") as file:
            fields = file.read().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total
