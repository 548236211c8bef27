"""The benchmark for GPUs: what it does without one, and its transfers with doubles in the host's memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diphase.benchmarks.gpu_transports import KIB, MIB, End, Size, make_end, measure
from diphase.kv_transfer.base import TransportContext

from ..conformance.host_gpu import ROOT, make_transport
from ..conformance.region_memory import HostMemory

SIZE = Size(pool_bytes=4 * MIB, transfer_bytes=256 * KIB, pieces=(16 * KIB, 256 * KIB), transfers=6, rounds=2)


def host_end(transport: str, incarnation: str, pool_bytes: int) -> End:
    memory = HostMemory(incarnation, pool_bytes)

    def make(context: TransportContext):  # type: ignore[no-untyped-def]
        return make_transport(transport, context)

    return make_end(incarnation, memory.region, torch.from_numpy(memory.bytes), make)


def cuda_ipc_end(incarnation: str, pool_bytes: int) -> End:
    return host_end("cuda_ipc", incarnation, pool_bytes)


def nccl_end(incarnation: str, pool_bytes: int) -> End:
    return host_end("nccl", incarnation, pool_bytes)


def damaging_end(incarnation: str, pool_bytes: int) -> End:
    """Its memory is not what arrives."""
    end = cuda_ipc_end(incarnation, pool_bytes)
    if incarnation == "destination":
        end.pool = end.pool.clone()
    return end


@pytest.fixture(autouse=True)
def _children_find_the_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)


@pytest.mark.parametrize("make", [cuda_ipc_end, nccl_end])
def test_transfers_are_checked_and_measured(make) -> None:  # type: ignore[no-untyped-def]
    result = measure(make, SIZE)
    assert result["bytes_are_right"]
    assert [(run["piece_bytes"], run["scattered"]) for run in result["runs"]] == [
        (16 * KIB, False),
        (16 * KIB, True),
        (256 * KIB, False),
    ]
    assert all(run["gb_s"] > 0 for run in result["runs"])
    assert result["one_16_kib_median_us"] > 0


def test_wrong_bytes_end_it_before_anything_is_measured() -> None:
    with pytest.raises(RuntimeError, match="not what was written"):
        measure(damaging_end, SIZE)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so_and_what_it_could_check() -> None:
    script = Path(ROOT) / "benchmarks" / "gpu.py"
    done = subprocess.run(
        [sys.executable, "-P", str(script)], capture_output=True, text=True, timeout=120, check=True
    )
    assert "no CUDA device here" in done.stderr
    result = json.loads(done.stdout)
    assert result["devices"] == []
    assert set(result["without_gpu"]) >= {"cuda_ipc", "nccl", "kernels"}
    assert result["versions"]["torch"] == torch.__version__


def test_an_unknown_section_is_refused_with_those_that_exist() -> None:
    script = Path(ROOT) / "benchmarks" / "gpu.py"
    done = subprocess.run(
        [sys.executable, "-P", str(script), "--sections", "cuda_ipc,pigeons"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert "no sections pigeons; there are cuda_ipc, nccl, kernels" in done.stderr
