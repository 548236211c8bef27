"""What the benchmarks share."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from diphase.benchmarks import harness

# A benchmark in the background of a shell: SIGINT is ignored, and it has a cluster (a stand-in) of its own.
BENCHMARK = """
import asyncio, signal, sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.SIG_IGN)
from diphase.benchmarks import harness
from diphase.cluster.load.served import serving

CLUSTER = '''
import signal, sys, time
from concurrent.futures import ThreadPoolExecutor
import grpc
from diphase.proto import inference_pb2 as pb
from diphase.proto.inference_pb2_grpc import InferenceServicer, add_InferenceServicer_to_server

class Gateway(InferenceServicer):
    def Health(self, request, context):
        return pb.HealthResponse(ready=True)

signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
port = sys.argv[2].partition("=")[2]
server = grpc.server(ThreadPoolExecutor(1))
add_InferenceServicer_to_server(Gateway(), server)
server.add_insecure_port("127.0.0.1:" + port)
server.start()
signal.sigwait({signal.SIGTERM})
server.stop(0)
print("cluster stopped", flush=True)
'''

async def main():
    async with serving([], Path(sys.argv[1]), command=(sys.executable, "-P", "-c", CLUSTER)):
        print("measuring", flush=True)
        await asyncio.Event().wait()

harness.run(main())
"""


def test_a_benchmark_that_is_terminated_stops_its_cluster_even_without_sigint(tmp_path: Path) -> None:
    log = tmp_path / "serve.log"
    benchmark = subprocess.Popen(
        [sys.executable, "-P", "-c", BENCHMARK, str(log)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert benchmark.stdout is not None
    assert benchmark.stdout.readline() == "measuring\n"
    os.kill(benchmark.pid, signal.SIGTERM)
    _out, err = benchmark.communicate(timeout=60)
    assert (benchmark.returncode, err) == (harness.TERMINATED, "")
    assert log.read_text() == "cluster stopped\n"


async def answer() -> int:
    return 7


def test_a_benchmark_that_ends_returns_its_result() -> None:
    assert harness.run(answer()) == 7


def test_a_result_says_how_when_and_where_it_came_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/benchmarks/handoff.py", "--requests", "7"])
    harness.write_result(tmp_path / "r.json", {"medians": {"a": 1.5}})
    read = json.loads((tmp_path / "r.json").read_text())
    assert read["command"] == ".venv/bin/python -P benchmarks/handoff.py --requests 7"
    assert read["medians"] == {"a": 1.5}
    assert {"date", "versions", "machine"} <= read.keys()
