"""A cluster of one's own for the length of a measurement: `diphase serve` as a subprocess, on a free port."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import grpc.aio

from ...proto import inference_pb2 as pb
from ...proto.errors import InternalError
from ...proto.inference_pb2_grpc import InferenceStub
from ..endpoint import open_channel

START_S = 180.0
STOP_S = 60.0
POLL_S = 0.25

SERVE = (
    sys.executable,
    "-P",
    "-c",
    "import sys; from diphase.cluster.cli import main; sys.exit(main())",
    "serve",
)


@asynccontextmanager
async def serving(
    settings: Sequence[str], log: Path, *, command: Sequence[str] = SERVE, start_s: float = START_S
) -> AsyncIterator[str]:
    """Starts a cluster with `settings` (as of `--set`), yields its gateway's address once it can place
    requests, and stops it as Ctrl-C does: it drains. Its output is appended to `log`.

    Raises:
        InternalError: it ends or is not ready in time, or does not stop when told to; the message has the
        end of
            its log.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [*command, "--set", f"gateway.port={port}"]
    for setting in settings:
        words += ["--set", setting]
    with log.open("ab") as output:
        # A process group of its own: Ctrl-C reaches this process, which then stops the cluster once.
        process = await asyncio.create_subprocess_exec(*words, stdout=output, stderr=output, process_group=0)
        try:
            await _wait_ready(process, f"127.0.0.1:{port}", log, start_s)
            yield f"127.0.0.1:{port}"
        finally:
            await _stop(process, log)


async def _wait_ready(process: asyncio.subprocess.Process, address: str, log: Path, start_s: float) -> None:
    deadline = time.monotonic() + start_s
    async with open_channel(address) as channel:
        stub = InferenceStub(channel)
        while time.monotonic() < deadline:
            if process.returncode is not None:
                raise InternalError(f"the cluster ended with status {process.returncode}:\n{_tail(log)}")
            try:
                health = await stub.Health(pb.HealthRequest(), timeout=2.0)
            except grpc.aio.AioRpcError:
                pass  # not listening yet
            else:
                if health.ready:
                    return
            await asyncio.sleep(POLL_S)
    raise InternalError(f"the cluster was not ready after {start_s:g} s:\n{_tail(log)}")


async def _stop(process: asyncio.subprocess.Process, log: Path) -> None:
    """Returns when the process is gone, whatever it took."""
    if process.returncode is None:
        # Not SIGINT: whoever is started in the background of a shell hands on that it is ignored.
        process.send_signal(signal.SIGTERM)
    try:
        await asyncio.wait_for(process.wait(), STOP_S)
    except TimeoutError:
        process.kill()
        await process.wait()
        raise InternalError(f"the cluster did not stop within {STOP_S:.0f} s:\n{_tail(log)}") from None


def _tail(log: Path, lines: int = 20) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
