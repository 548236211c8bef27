"""A cluster as a subprocess: ready when it says so, stopped as Ctrl-C does, and never left behind."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from diphase.cluster.endpoint import open_channel
from diphase.cluster.load.client import fetch_model
from diphase.cluster.load.served import serving
from diphase.proto.errors import InternalError
from diphase.proto.inference_pb2_grpc import InferenceStub

# Stands in for `diphase serve`: notes its pid, answers on the port it is given, says at its end what it was
# told.
STAND_IN = """
import os, signal, sys
from concurrent.futures import ThreadPoolExecutor
import grpc
from diphase.proto import inference_pb2 as pb
from diphase.proto.inference_pb2_grpc import InferenceServicer, add_InferenceServicer_to_server

class Gateway(InferenceServicer):
    asked = 0
    def Health(self, request, context):
        self.asked += 1
        return pb.HealthResponse(ready=self.asked > 1)
    def GetModel(self, request, context):
        return pb.GetModelResponse(model=str(os.getpid()))

signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
settings = sys.argv[2::2]
port = next(s for s in settings if s.startswith("gateway.port=")).partition("=")[2]
server = grpc.server(ThreadPoolExecutor(1))
add_InferenceServicer_to_server(Gateway(), server)
server.add_insecure_port("127.0.0.1:" + port)
server.start()
signal.sigwait({signal.SIGTERM})
server.stop(0)
print("stopped with", settings[1:], flush=True)
"""


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


async def test_a_cluster_is_ready_inside_and_gone_after(tmp_path: Path) -> None:
    log = tmp_path / "serve.log"
    command = (sys.executable, "-P", "-c", STAND_IN)
    async with serving(["a.b=1", "c=2"], log, command=command) as address, open_channel(address) as channel:
        model = await fetch_model(InferenceStub(channel), address)
        assert not gone(int(model.model))
    assert gone(int(model.model))
    assert "stopped with ['a.b=1', 'c=2']" in log.read_text()


async def test_a_cluster_is_stopped_when_the_measurement_fails(tmp_path: Path) -> None:
    pids: list[int] = []

    async def fail() -> None:
        async with serving([], tmp_path / "log", command=(sys.executable, "-P", "-c", STAND_IN)) as address:
            async with open_channel(address) as channel:
                pids.append(int((await fetch_model(InferenceStub(channel), address)).model))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()
    assert gone(pids[0])


async def test_a_cluster_that_ends_at_once_is_reported_with_its_last_words(tmp_path: Path) -> None:
    command = (sys.executable, "-c", "import sys; sys.exit('no such model')")
    with pytest.raises(InternalError, match=r"ended with status 1:\nno such model"):
        async with serving([], tmp_path / "log", command=command):
            raise AssertionError("it was never ready")


async def test_a_cluster_that_is_never_ready_is_given_up_and_stopped(tmp_path: Path) -> None:
    command = (sys.executable, "-c", "import signal; signal.sigwait({signal.SIGTERM})")
    with pytest.raises(InternalError, match=r"not ready after 0\.5 s"):
        async with serving([], tmp_path / "log", command=command, start_s=0.5):
            raise AssertionError("it was never ready")
