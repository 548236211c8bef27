"""Other libraries' own loops as movers for benchmarks/transport.py: NIXL and the Mooncake transfer engine.

Neither has what our transports add (admission, deadlines, fences, acknowledgements): source and destination
agree on what comes, and the loop posts and polls. They are no dependencies of this package beyond the extra
`nixl`; what is missing is passed over with a sentence. To have both:

    .venv/bin/pip install nixl-cu13 mooncake-transfer-engine-non-cuda
    apt-get install libibverbs1        (Mooncake loads it, also where it moves bytes over TCP)
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from diphase.benchmarks.transport_movers import DEPTH, POOL_BYTES, Far, Mover, Pool, Shape, source_pool

HOST = "127.0.0.1"
MOONCAKE_PIECES = 1024
"""More in flight, and its TCP transport refuses some."""


def rivals(context: Any) -> dict[str, Callable[[], Mover]]:
    """Makers, which raise ImportError where the library is missing."""
    return {
        "nixl_loop": lambda: NixlLoop(context),
        "nixl_loop_tcp": lambda: NixlLoop(context, tls="tcp"),
        "mooncake": lambda: Mooncake(context),
    }


@contextmanager
def ucx_lanes(tls: str | None) -> Iterator[None]:
    """Agents made within, and processes started within, may use these of UCX's transports; None: all."""
    before = os.environ.get("UCX_TLS")
    if tls is not None:
        os.environ["UCX_TLS"] = tls
    try:
        yield
    finally:
        if tls is not None and before is None:
            del os.environ["UCX_TLS"]
        elif tls is not None and before is not None:
            os.environ["UCX_TLS"] = before


def address(memory: memoryview) -> int:
    return int(np.frombuffer(memory, dtype=np.uint8).ctypes.data)


class NixlEnd:
    """An agent with one pool and no thread of its own."""

    def __init__(self, name: str, pool: Pool) -> None:
        os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")
        import nixl_cu13

        self.pool = pool  # which has to stay mapped
        self.address = address(pool.memory)
        self.agent = nixl_cu13.nixl_agent(
            name, nixl_cu13.nixl_agent_config(enable_prog_thread=False, backends=["UCX"])
        )
        row = np.array([[self.address, POOL_BYTES, 0]], dtype=np.int64)
        self.agent.register_memory(row, "DRAM")


class NixlLoop:
    """Requests of a shape are made once, from lists prepared for the pool, and posted again and again, as
    NIXL's own benchmark does; both ends poll without a pause while bytes move."""

    def __init__(self, context: Any, tls: str | None = None) -> None:
        name = f"loop-{tls or 'all'}"
        with ucx_lanes(tls):
            self.end = NixlEnd(f"{name}-source", source_pool())
            self.far = Far(context, nixl_destination, f"{name}-destination")
            metadata, self.there = self.far.pipe.recv()
        self.peer = self.end.agent.add_remote_agent(metadata)
        self.lists: dict[int, tuple[Any, Any]] = {}
        """The pool in pieces of a size, here and there."""
        self.requests: dict[tuple[Shape, int], Any] = {}

    def move(self, shape: Shape, count: int) -> None:
        agent, tables = self.end.agent, shape.tables()
        self.far.pipe.send(count)
        moving: deque[Any] = deque()
        for i in range(count):
            request = self._request(shape, i % len(tables))
            while len(moving) >= DEPTH or request in moving:
                self._wait(moving.popleft())
            if agent.transfer(request, b"transfer") == "PROC":
                moving.append(request)
        while moving:
            self._wait(moving.popleft())
        self.far.pipe.recv()

    def _wait(self, request: Any) -> None:
        while (state := self.end.agent.check_xfer_state(request)) == "PROC":
            pass
        if state != "DONE":
            raise SystemExit(f"NIXL's own loop ended with {state}")

    def _request(self, shape: Shape, index: int) -> Any:
        if (shape, index) not in self.requests:
            piece, table = shape.piece_bytes, shape.tables()[index]
            if piece not in self.lists:
                self.lists[piece] = self._prepare(piece)
            local, remote = self.lists[piece]
            self.requests[shape, index] = self.end.agent.make_prepped_xfer(
                "WRITE",
                local,
                (table[:, 1] // piece).astype(np.int32),
                remote,
                (table[:, 3] // piece).astype(np.int32),
            )
        return self.requests[shape, index]

    def _prepare(self, piece: int) -> tuple[Any, Any]:
        count = POOL_BYTES // piece
        here = np.array([[self.end.address, piece, 0, piece, count]], dtype=np.int64)
        there = np.array([[self.there, piece, 0, piece, count]], dtype=np.int64)
        agent = self.end.agent
        return (
            agent.prep_xfer_dlist("NIXL_INIT_AGENT", here, "DRAM"),
            agent.prep_xfer_dlist(self.peer, there, "DRAM"),
        )

    def pids(self) -> list[int]:
        return [self.far.process.pid]

    def close(self) -> None:
        for request in self.requests.values():
            request.release()
        self.far.pipe.send(None)
        self.far.process.join()


def nixl_destination(pipe: Connection, pool: Pool, name: str) -> None:
    """Polls until as many notifications have come as were announced; sleeps between."""
    end = NixlEnd(name, pool)
    pipe.send((end.agent.get_agent_metadata(), end.address))
    while (left := pipe.recv()) is not None:
        while left > 0:
            left -= sum(map(len, end.agent.get_new_notifs().values()))
        pipe.send("arrived")


class MooncakeEnd:
    """A transfer engine over TCP with one pool; peers find each other without a metadata server."""

    def __init__(self, pool: Pool) -> None:
        os.environ.setdefault("GLOG_minloglevel", "2")  # else a line for each batch
        from mooncake.engine import TransferEngine

        self.pool = pool  # which has to stay mapped
        self.address = address(pool.memory)
        self.engine = TransferEngine()
        if self.engine.initialize(HOST, "P2PHANDSHAKE", "tcp", ""):
            raise ImportError("the Mooncake transfer engine does not start over TCP")
        if self.engine.register_memory(self.address, POOL_BYTES):
            raise ImportError("the Mooncake transfer engine does not register memory")
        self.name = f"{HOST}:{self.engine.get_rpc_port()}"


class Mooncake:
    """Its batch write, of which several are in flight; threads of its own move the bytes at both ends."""

    def __init__(self, context: Any) -> None:
        self.end = MooncakeEnd(source_pool())
        self.far = Far(context, mooncake_destination)
        self.peer, self.there = self.far.pipe.recv()

    def move(self, shape: Shape, count: int) -> None:
        engine, tables = self.end.engine, shape.tables()
        moving: deque[int] = deque()
        for i in range(count):
            table = tables[i % len(tables)]
            while moving and len(moving) >= min(DEPTH, MOONCAKE_PIECES // len(table)):
                self._wait(moving.popleft())
            batch = engine.batch_transfer_async_write(
                self.peer,
                (table[:, 1] + self.end.address).tolist(),
                (table[:, 3] + self.there).tolist(),
                table[:, 4].tolist(),
            )
            if batch <= 0:
                raise SystemExit(f"Mooncake refused a batch: {batch}")
            moving.append(batch)
        while moving:
            self._wait(moving.popleft())

    def _wait(self, batch: int) -> None:
        if self.end.engine.get_batch_transfer_status([batch]):
            raise SystemExit("a batch of Mooncake's failed")

    def pids(self) -> list[int]:
        return [self.far.process.pid]

    def close(self) -> None:
        self.far.pipe.send("end")
        self.far.process.join()


def mooncake_destination(pipe: Connection, pool: Pool) -> None:
    end = MooncakeEnd(pool)
    pipe.send((end.name, end.address))
    pipe.recv()
