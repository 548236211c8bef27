"""Every path through cuda_device.py and nccl_communicator.py, over doubles of CuPy's modules."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable

import numpy as np
import pytest
from diphase.kv_transfer.base import DeviceMemory, Region
from diphase.kv_transfer.transports import cuda_device, cuda_memory, nccl_communicator
from diphase.kv_transfer.transports.cuda_device import CudaDevice, cuda_device_of
from diphase.kv_transfer.transports.cuda_memory import CudaPool, Handle
from diphase.kv_transfer.transports.nccl_communicator import MAX_GROUP, CupyCommunicator
from diphase.proto.errors import ConfigError, InternalError, PeerLost, TransferError

from .cuda_double import DEVICES, Nccl, Runtime

PATIENCE_S = 20.0
Become = Callable[[Runtime], Runtime]


@pytest.fixture
def become(monkeypatch: pytest.MonkeyPatch) -> Become:
    """Makes this process one with that runtime, which has exported nothing yet."""

    def with_runtime(runtime: Runtime) -> Runtime:
        for module in (cuda_device, cuda_memory, nccl_communicator):
            monkeypatch.setattr(module, "cuda_runtime", lambda: runtime)
        monkeypatch.setattr(cuda_device, "allocation_base", runtime.base_of)
        monkeypatch.setattr(cuda_device, "_exported", {})
        return runtime

    return with_runtime


@pytest.fixture
def runtime(become: Become) -> Runtime:
    return become(Runtime())


def copied(device: CudaDevice, passed: threading.Event, runs: list[tuple[int, int, int]]) -> None:
    copy = device.copy(np.array(runs, dtype=np.int64))
    assert passed.wait(PATIENCE_S)
    passed.clear()
    assert device.passed(copy)


def test_a_pool_is_an_allocation_of_its_own(runtime: Runtime) -> None:
    pool = CudaPool(1, 4096)
    assert runtime.current.device == 1
    assert pool.region.device == DeviceMemory(device=1, pointer=pool.pointer, num_bytes=4096)
    assert pool.__cuda_array_interface__["data"] == (pool.pointer, False)
    assert pool.__cuda_array_interface__["shape"] == (4096,)
    pool.close()
    pool.close()
    assert runtime.allocations == {}
    with pytest.raises(TransferError, match="closed"):
        _ = pool.region


def test_what_a_pool_cannot_have_is_said(become: Become) -> None:
    become(Runtime())
    with pytest.raises(ConfigError, match=r"2048 MiB does not fit cuda:0.*lower engine\.kv_cache_mib"):
        CudaPool(0, 2 << 30)
    with pytest.raises(TransferError, match="no device cuda:2"):
        CudaPool(2, 8)
    become(Runtime(num_devices=0))
    with pytest.raises(TransferError, match="CUDA_VISIBLE_DEVICES"):
        CudaPool(0, 8)
    become(Runtime(num_devices=-1))
    with pytest.raises(TransferError, match="no CUDA device is usable"):
        CudaPool(0, 8)


def test_bytes_are_copied_into_the_pool_of_another_process(become: Become) -> None:
    theirs = become(Runtime())
    pool = CudaPool(0, 4096)
    part = Region(buffer=None, device=DeviceMemory(device=0, pointer=pool.pointer + 1024, num_bytes=1024))
    handles = [cuda_device_of(region, lambda: None).export(region) for region in (pool.region, part)]
    ours = become(Runtime(theirs.allocations))
    source, passed = CudaPool(0, 100), threading.Event()
    ctypes.memset(source.pointer, 7, 100)
    device = CudaDevice(0, passed.set)
    whole, inside = (device.map(handle, 1024) for handle in handles)
    assert inside - whole == 1024
    assert ours.opened == [pool.pointer]  # once for both
    copied(device, passed, [(source.pointer, inside + 10, 100)])
    copied(device, passed, [(source.pointer, inside + 200, 50)])
    got = ctypes.string_at(pool.pointer, 4096)
    assert got == (bytes(1034) + b"\7" * 100 + bytes(90) + b"\7" * 50).ljust(4096, b"\0")
    device.unmap_all(handles[:1])
    assert ours.closed == []
    device.unmap_all(handles[1:])
    assert ours.closed == [pool.pointer]
    assert len(ours.alive) == 2  # a stream, and one event that was used twice
    device.close()
    assert ours.alive == set()


def test_close_waits_for_copies_and_undoes_mappings(become: Become) -> None:
    theirs = become(Runtime())
    pool = CudaPool(0, 64)
    handle = CudaDevice(0, lambda: None).export(pool.region)
    ours = become(Runtime(theirs.allocations))
    device, passed = CudaDevice(0, lambda: None), threading.Event()
    base = device.map(handle, 64)
    ours.may_end.clear()
    copy = device.copy(np.array([[base, base + 8, 8]]))
    assert not device.passed(copy)

    def close() -> None:
        device.close()
        passed.set()

    closing = threading.Thread(target=close)
    closing.start()
    assert ours.closed == []
    ours.may_end.set()
    assert passed.wait(PATIENCE_S)
    closing.join()
    assert ours.closed == [pool.pointer]


def test_memory_of_this_process_is_not_opened_but_reached(runtime: Runtime) -> None:
    """CUDA does not open a handle in the process that made it."""
    here, there = CudaPool(0, 64), CudaPool(1, 64)
    device = CudaDevice(0, lambda: None)
    assert device.map(device.export(here.region), 64) == here.pointer
    assert runtime.peers == []
    handle = CudaDevice(1, lambda: None).export(there.region)
    assert device.map(handle, 64) == there.pointer
    assert runtime.peers == [(0, 1)]
    device.close()
    assert runtime.opened == runtime.closed == []


def test_many_short_runs_are_one_launch_and_long_ones_a_copy_each(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[tuple[int, int, int]] = []

    def copy_runs(runs: np.ndarray, device: int, stream: int) -> list[object]:
        launched.append((len(runs), device, stream))
        return []

    pytest.importorskip("triton", reason="Triton is not installed (extra `cuda`)")
    monkeypatch.setattr("diphase.kernels.copy_runs_triton.copy_runs_on_stream", copy_runs)
    pool, passed = CudaPool(1, 8 << 20), threading.Event()
    device = CudaDevice(1, passed.set)
    half = pool.pointer + (4 << 20)
    copied(device, passed, [(pool.pointer + i * 512, half + i * 512, 256) for i in range(100)])
    assert launched == [(100, 1, device._stream)]
    assert runtime.copies == []
    copied(device, passed, [(pool.pointer + i * 2**19, half + i * 2**19, 2**18) for i in range(6)])
    copied(device, passed, [(pool.pointer, half, 1)] * 3)
    assert len(launched) == 1
    assert runtime.copies == [2**18] * 6 + [1] * 3
    device.close()


def test_a_kernel_that_cannot_be_compiled_makes_the_device_useless(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="Triton is not installed (extra `cuda`)")
    prepared: list[int] = []
    monkeypatch.setattr("diphase.kernels.copy_runs_triton.prepare", prepared.append)
    CudaDevice(1, lambda: None).prepare()
    assert prepared == [1]

    def fail(device: int) -> None:
        raise RuntimeError("no C compiler")

    monkeypatch.setattr("diphase.kernels.copy_runs_triton.prepare", fail)
    with pytest.raises(TransferError, match="copy kernel cannot be compiled for cuda:1: no C compiler"):
        CudaDevice(1, lambda: None).prepare()


def test_failures_of_the_device_are_transfer_errors(runtime: Runtime) -> None:
    pool, passed = CudaPool(0, 64), threading.Event()
    device = CudaDevice(0, passed.set)
    runtime.may_end.clear()
    copy = device.copy(np.array([[pool.pointer, pool.pointer + 8, 8]]))
    runtime.fails_with = 719
    runtime.may_end.set()
    assert passed.wait(PATIENCE_S)
    with pytest.raises(TransferError, match="the device copy failed: cudaError 719"):
        device.passed(copy)
    with pytest.raises(TransferError, match="the device copy failed: cudaError 719"):
        device.copy(np.array([[pool.pointer, pool.pointer + 8, 8]]))
    device.close()


def test_what_cannot_be_mapped_or_exported_is_said(runtime: Runtime) -> None:
    device, pool = CudaDevice(0, lambda: None), CudaPool(1, 64)
    with pytest.raises(TransferError, match="not on cuda:0, where the others are"):
        device.export(pool.region)
    nowhere = Region(buffer=None, device=DeviceMemory(device=0, pointer=64, num_bytes=8))
    with pytest.raises(TransferError, match=r"cannot be exported.*CudaPool.*expandable segments"):
        device.export(nowhere)
    with pytest.raises(TransferError, match="cannot be mapped: cudaError 400"):
        device.map(Handle(DEVICES[0], bytes(64), 0).pack(), 8)
    with pytest.raises(TransferError, match="88"):
        device.map(b"short", 8)


def test_gpus_are_told_by_their_uuid(become: Become) -> None:
    become(Runtime(num_devices=3))
    device = CudaDevice(0, lambda: None)
    assert device.why_unreachable(DEVICES[0]) is None
    assert device.why_unreachable(DEVICES[1]) is None
    assert "no peer access to the peer's GPU, cuda:2 here" in str(device.why_unreachable(DEVICES[2]))
    assert "not visible in this process" in str(device.why_unreachable(bytes(16)))


class TestCupyCommunicator:
    @pytest.fixture
    def nccl(self, monkeypatch: pytest.MonkeyPatch) -> Nccl:
        nccl = Nccl()
        monkeypatch.setattr(nccl_communicator, "load_nccl", lambda: nccl)
        return nccl

    @pytest.fixture
    def pool(self, become: Become) -> CudaPool:
        theirs = become(Runtime())
        pool = CudaPool(1, 4096)
        self.handle = CudaDevice(1, lambda: None).export(pool.region)
        self.runtime = become(Runtime(theirs.allocations))
        return pool

    def opened(self, rank: int) -> CupyCommunicator:
        communicator = CupyCommunicator()
        communicator.map(self.handle, 4096)
        communicator.open(bytes(128), rank)
        return communicator

    @pytest.mark.parametrize(("rank", "does", "answers"), [(0, "send", "recv"), (1, "recv", "send")])
    def test_runs_are_posted_in_groups_to_the_other_rank(
        self, nccl: Nccl, pool: CudaPool, rank: int, does: str, answers: str
    ) -> None:
        communicator = self.opened(rank)
        assert nccl.calls == [("open", 2, 128, rank)]
        assert self.runtime.current.device == 1  # the GPU of the pool, not the first one
        nccl.calls.clear()
        posted = communicator.move([(0, i, 2) for i in range(MAX_GROUP + 1)])
        stream = communicator._stream
        posts = [(does, pool.pointer + i, 2, nccl.NCCL_UINT8, 1 - rank, stream) for i in range(MAX_GROUP + 1)]
        assert nccl.calls == [
            ("group",), *posts[:MAX_GROUP], ("end",), ("group",), posts[MAX_GROUP], ("end",)
        ]  # fmt: skip
        assert communicator.passed(posted)
        nccl.calls.clear()
        communicator.move([])
        assert nccl.calls[1][0] == answers
        assert nccl.calls[1][2] == 1
        communicator.close()
        assert nccl.calls[-1] == ("abort",)

    def test_what_has_not_passed_is_not_said_to_have(self, nccl: Nccl, pool: CudaPool) -> None:
        communicator = self.opened(0)
        self.runtime.may_end.clear()
        posted = communicator.move([(0, 0, 8)])
        assert not communicator.passed(posted)
        self.runtime.may_end.set()
        assert communicator.passed(posted)

    def test_errors_become_ours(self, nccl: Nccl, pool: CudaPool) -> None:
        communicator = self.opened(0)
        posted = communicator.move([(0, 0, 8)])
        nccl.fails_with = 6
        with pytest.raises(PeerLost, match="NCCL_ERROR 6"):
            communicator.passed(posted)
        nccl.fails_with = 3
        with pytest.raises(InternalError, match="NCCL_ERROR 3"):
            CupyCommunicator().open(bytes(128), 0)
        nccl.fails_with = None
        self.runtime.fails_with = 700
        with pytest.raises(TransferError, match="CUDA error 700"):
            communicator.passed(posted)

    def test_a_gpu_that_the_owner_does_not_see_is_named(self, nccl: Nccl, pool: CudaPool) -> None:
        handle = Handle(bytes(16), bytes(64), 0).pack()
        with pytest.raises(TransferError, match=f"GPU {bytes(16).hex()} is not visible"):
            CupyCommunicator().map(handle, 8)

    def test_closed_before_it_was_opened_it_has_nothing_to_abort(self, nccl: Nccl, pool: CudaPool) -> None:
        CupyCommunicator().close()
        assert nccl.calls == []


def test_the_real_libraries_have_what_the_doubles_have() -> None:
    cuda = pytest.importorskip("cupy", reason="CuPy is not installed (extra `cuda`)").cuda
    from cupy.cuda import nccl

    own = {"base_of"}
    for double, real in ((Runtime, cuda.runtime), (Nccl, nccl)):
        names = [name for name in vars(double) if not name.startswith("__") and name not in own]
        called = [name for name in names if name not in ("_new", "_check")]
        assert called
        assert [name for name in called if not hasattr(real, name)] == []
    for name in ("send", "recv", "abort", "check_async_error"):
        assert hasattr(nccl.NcclCommunicator, name)
    for name in ("streamNonBlocking", "eventDisableTiming", "eventBlockingSync", "memcpyDeviceToDevice"):
        assert getattr(cuda.runtime, name) == getattr(Runtime, name)
