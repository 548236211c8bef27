"""A process that bears workers: told by lines of JSON, it forks one worker process for each, in a network
namespace where one is named.

What all of them import is imported once, so that a worker that a test has killed is back in a fraction of a
second. Each says where it serves by a line on the shared standard output, drains at SIGTERM, and dies with
this process.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import signal
import sys
import traceback
from typing import Any

from diphase.decode_workers.config import DecodeSchedulerConfig, DecodeWorkerConfig
from diphase.decode_workers.worker import start as start_decode
from diphase.engine.config import EngineConfig
from diphase.engine.host_config import HostConfig
from diphase.engine.server import RunningWorker
from diphase.kv_transfer.config import KvTransferConfig
from diphase.prefill_workers.config import PrefillSchedulerConfig, PrefillWorkerConfig
from diphase.prefill_workers.worker import start as start_prefill
from diphase.proto.parent_death import end_with

CLONE_NEWNET = 0x40000000


def main() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them: no zombies
    nursery = os.getpid()
    for line in sys.stdin:
        order = json.loads(line)
        if os.fork() == 0:
            status = 1
            try:
                _prepare(nursery, order["namespace"])
                asyncio.run(_work(order))
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)


def _prepare(nursery: int, namespace: str | None) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.close(0)
    end_with(nursery)
    if namespace is not None:
        libc = ctypes.CDLL(None, use_errno=True)
        handle = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
        if libc.setns(handle, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns {namespace}")
        os.close(handle)


def _say(**words: Any) -> None:
    os.write(1, (json.dumps(words) + "\n").encode())  # one write: lines of several workers do not mix


async def _work(order: dict[str, Any]) -> None:
    worker = await _start(order)
    name = {"worker_id": worker.hello.worker_id, "incarnation": worker.incarnation}
    draining = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, draining.set)
    _say(**name, pid=os.getpid(), address=worker.address, metrics=worker.metrics_address)
    told = asyncio.create_task(draining.wait())
    closed = asyncio.create_task(worker.wait_closed())
    await asyncio.wait((told, closed), return_when=asyncio.FIRST_COMPLETED)
    if not closed.done():
        await worker.drain()
    await worker.close()
    told.cancel()
    await asyncio.gather(told, closed, return_exceptions=True)


async def _start(order: dict[str, Any]) -> RunningWorker:
    engine, host = EngineConfig(**order["engine"]), HostConfig(**order["host"])
    transfer = KvTransferConfig(**order["kv_transfer"])
    names = {"worker_id": order["worker_id"], "incarnation": order["incarnation"]}
    if order["role"] == "prefill":
        prefill = PrefillSchedulerConfig(**order["scheduler"])
        return await start_prefill(
            PrefillWorkerConfig(engine=engine, host=host, kv_transfer=transfer, scheduler=prefill), **names
        )
    decode = DecodeSchedulerConfig(**order["scheduler"])
    return await start_decode(
        DecodeWorkerConfig(engine=engine, host=host, kv_transfer=transfer, scheduler=decode), **names
    )


if __name__ == "__main__":
    main()
    os._exit(0)  # at once: the workers end with it
