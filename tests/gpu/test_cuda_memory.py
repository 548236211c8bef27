"""Pools that can be exported, and the copies of the transport cuda_ipc. The transport as a whole is asked by
tests/conformance, with the same marker."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from diphase.kernels.copy_runs_triton import copy_runs_triton
from diphase.kv_transfer.base import DeviceMemory, Region
from diphase.kv_transfer.transports.cuda_device import CudaDevice
from diphase.kv_transfer.transports.cuda_memory import CudaPool, Handle
from diphase.proto.errors import ConfigError, TransferError

from ..conformance.region_memory import GpuMemory, num_gpus

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(num_gpus() == 0, reason="no CUDA device is usable here"),
]
PATIENCE_S = 20.0
MIB = 1 << 20


def test_torch_sees_a_pool_without_a_copy() -> None:
    pool = CudaPool(0, 4096)
    tensor = torch.as_tensor(pool, device="cuda:0")
    assert tensor.data_ptr() == pool.pointer
    assert tensor.shape == (4096,)
    tensor.view(torch.bfloat16)[:] = 1.5
    assert (torch.as_tensor(pool, device="cuda:0").view(torch.bfloat16) == 1.5).all()
    del tensor
    pool.close()
    pool.close()
    with pytest.raises(TransferError, match="closed"):
        _ = pool.region


def test_a_pool_that_does_not_fit_says_so() -> None:
    with pytest.raises(ConfigError, match=r"does not fit cuda:0.*lower engine\.kv_cache_mib"):
        CudaPool(0, 1 << 50)


def test_a_region_inside_an_allocation_is_named_by_its_offset() -> None:
    device, pool = CudaDevice(0, lambda: None), CudaPool(0, 4 * MIB)
    inside = DeviceMemory(device=0, pointer=pool.pointer + MIB, num_bytes=MIB)
    whole = Handle.unpack(device.export(pool.region))
    part = Handle.unpack(device.export(Region(buffer=None, device=inside)))
    assert (part.device, part.allocation) == (whole.device, whole.allocation)
    assert part.offset - whole.offset == MIB
    assert device.map(part.pack(), MIB) == pool.pointer + MIB  # in the process that has it already
    device.close()
    pool.close()


def test_memory_of_expandable_segments_is_refused_with_what_to_use() -> None:
    script = (
        "import torch\n"
        "from diphase.kv_transfer.base import DeviceMemory, Region\n"
        "from diphase.kv_transfer.transports.cuda_device import CudaDevice\n"
        "tensor = torch.zeros(1 << 22, dtype=torch.uint8, device='cuda:0')\n"
        "memory = DeviceMemory(device=0, pointer=tensor.data_ptr(), num_bytes=1 << 22)\n"
        "CudaDevice(0, lambda: None).export(Region(buffer=None, device=memory))\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", script],
        env={**os.environ, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert "the region cannot be exported" in done.stderr
    assert "CudaPool" in done.stderr


@pytest.mark.parametrize(
    ("num_runs", "run_bytes"),
    [(1, 3 * MIB), (3, 16384), (500, 16384), (500, 16000), (500, 77), (20, 512 * 1024), (2, 0)],
)
def test_runs_are_copied_and_nothing_else(num_runs: int, run_bytes: int) -> None:
    passed = threading.Event()
    device, size = CudaDevice(0, passed.set), 32 * MIB
    source, target = GpuMemory(size), GpuMemory(size)
    rng = np.random.default_rng(num_runs)
    data = rng.integers(1, 256, size, dtype=np.uint8)
    source.bytes[:] = data
    # Neighbours with a gap: what is too much would show.
    stride = run_bytes + (16 if run_bytes % 16 == 0 else 5)
    places = np.stack([rng.permutation(size // stride)[:num_runs] * stride for _ in range(2)])
    bases = device.address(source.region), device.address(target.region)
    runs = np.empty((num_runs, 3), dtype=np.int64)
    runs[:, 0], runs[:, 1], runs[:, 2] = bases[0] + places[0], bases[1] + places[1], run_bytes
    copy = device.copy(runs)
    assert passed.wait(PATIENCE_S)
    assert device.passed(copy)
    wanted = np.zeros(size, dtype=np.uint8)
    for begin, to in places.T.tolist():
        wanted[to : to + run_bytes] = data[begin : begin + run_bytes]
    np.testing.assert_array_equal(target.bytes, wanted)
    device.close()
    source.close()
    target.close()


def test_a_device_is_prepared_without_harm() -> None:
    device, pool = CudaDevice(0, lambda: None), GpuMemory(MIB)
    device.prepare()
    assert not pool.bytes.any()
    device.close()
    pool.close()


@pytest.mark.parametrize("num_programs", [1, 20, 500])
def test_the_number_of_programs_changes_nothing(num_programs: int) -> None:
    source = torch.randint(0, 256, (MIB,), dtype=torch.uint8, device="cuda:0")
    target = torch.zeros_like(source)
    order = np.random.default_rng(1).permutation(64) * 16384
    runs = np.stack([source.data_ptr() + order, target.data_ptr() + order, np.full(64, 16384)], axis=1)
    copy_runs_triton(runs.astype(np.int64), "cuda:0", num_programs=num_programs)
    assert torch.equal(source, target)


def test_addresses_past_two_to_the_32_are_not_cut() -> None:
    if torch.cuda.mem_get_info()[0] < 6 << 30:
        pytest.skip("needs 6 GiB of GPU memory")
    memory = torch.zeros(5 << 30, dtype=torch.uint8, device="cuda:0")
    memory[:16384] = 7
    far = memory.data_ptr() + (5 << 30) - 16384
    runs = np.array([[memory.data_ptr(), far, 8192], [memory.data_ptr(), far + 8192, 8192]], dtype=np.int64)
    copy_runs_triton(runs, "cuda:0")
    assert (memory[-16384:] == 7).all()
    assert not memory[16384:-16384].any()
