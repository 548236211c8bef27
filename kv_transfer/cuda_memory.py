"""CUDA by CuPy's runtime: memory that other processes of the host may map, and copies on a stream of their
own. Knows no peers and no transfers. Every call names its device first: the current one is a thread's own."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..proto.errors import ConfigError, TransferError
from .base import DeviceMemory, Region

Runs = NDArray[np.int64]
"""[n, 3]: source address, target address, length; bytes."""

_HANDLE = struct.Struct("<16s64sQ")
LONG_RUN_BYTES = 256 * 1024
"""From this average on, runs are copied one by one; below, one kernel copies all: a call for each 16 KiB
costs a hundred times what its bytes do."""
NOT_READY = 600
"""cudaErrorNotReady."""
FEW_RUNS = 4
"""So few are copied one by one in any case."""


@dataclass(frozen=True, slots=True)
class Handle:
    """Names device memory to the other processes of the host."""

    device: bytes
    """The GPU's UUID: indices differ from process to process."""
    allocation: bytes
    """cudaIpcMemHandle_t of the whole allocation."""
    offset: int
    """Of the memory in it, bytes."""

    def pack(self) -> bytes:
        return _HANDLE.pack(self.device, self.allocation, self.offset)

    @classmethod
    def unpack(cls, data: bytes) -> Handle:
        """
        Raises:
            TransferError: it is none.
        """
        if len(data) != _HANDLE.size:
            raise TransferError(f"a handle of device memory has {len(data)} bytes, not {_HANDLE.size}")
        return cls(*_HANDLE.unpack(data))


class Device(Protocol):
    """What a transport asks of one GPU. Tests have one over shared memory."""

    uuid: bytes

    def export(self, region: Region) -> bytes:
        """The packed Handle of a region.

        Raises:
            TransferError: other processes cannot map it.
        """
        ...

    def why_unreachable(self, uuid: bytes) -> str | None:
        """None when memory of that GPU can be mapped here, else the reason."""
        ...

    def map(self, handle: bytes, num_bytes: int) -> int:
        """The address here of memory that another process exported.

        Raises:
            TransferError: it cannot be mapped.
        """
        ...

    def unmap_all(self, handles: list[bytes]) -> None:
        """Undoes map(); nothing may be reading or writing there."""
        ...

    def address(self, region: Region) -> int: ...

    def copy(self, runs: Runs) -> object:
        """Starts a copy on the stream; returns what passed() takes.

        Raises:
            TransferError: the device failed.
        """
        ...

    def passed(self, copy: object) -> bool:
        """Whether it has ended; copies end in the order of the calls.

        Raises:
            TransferError: the device failed.
        """
        ...

    def close(self) -> None:
        """Returns when no copy moves any more. Blocks."""
        ...


def cuda_runtime() -> Any:
    """CuPy's bindings; they can be imported without a driver.

    Raises:
        ModuleNotFoundError: CuPy is not installed.
    """
    from cupy.cuda import runtime

    return runtime


def device_uuid(runtime: Any, index: int) -> bytes:
    return bytes(runtime.getDeviceProperties(index)["uuid"])


def num_devices(runtime: Any) -> int:
    """
    Raises:
        TransferError: none is usable.
    """
    try:
        count: int = runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        raise TransferError(f"no CUDA device is usable here: {error}") from error
    if count == 0:
        raise TransferError("no CUDA device is visible here; see CUDA_VISIBLE_DEVICES")
    return count


class CudaPool:
    """Device memory in an allocation of its own. `torch.as_tensor(pool, device=...)` sees it without a copy.

    torch's own allocator will not do: with expandable segments its memory cannot be exported, and without
    them a handle would open whatever else shares the segment to the peer.
    """

    def __init__(self, device: int, num_bytes: int) -> None:
        """
        Raises:
            ConfigError: the device has no room.
            TransferError: there is no such device.
        """
        self._runtime = cuda_runtime()
        if device >= num_devices(self._runtime):
            raise TransferError(f"there is no device cuda:{device} here")
        self._runtime.setDevice(device)
        self.device = device
        self.num_bytes = num_bytes
        try:
            self._pointer: int | None = self._runtime.malloc(num_bytes)
        except self._runtime.CUDARuntimeError as error:
            raise ConfigError(
                f"a pool of {num_bytes >> 20} MiB does not fit cuda:{device} ({error}); "
                "lower engine.kv_cache_mib"
            ) from error

    @property
    def pointer(self) -> int:
        """
        Raises:
            TransferError: the pool is closed.
        """
        if self._pointer is None:
            raise TransferError("the pool is closed")
        return self._pointer

    @property
    def region(self) -> Region:
        memory = DeviceMemory(device=self.device, pointer=self.pointer, num_bytes=self.num_bytes)
        return Region(buffer=None, device=memory)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": (self.num_bytes,),
            "typestr": "|u1",
            "data": (self.pointer, False),
            "strides": None,
            "version": 3,
        }

    def close(self) -> None:
        """Frees it; no transport and no tensor may use it any more. Idempotent."""
        if self._pointer is not None:
            self._runtime.setDevice(self.device)
            self._runtime.free(self._pointer)
            self._pointer = None


@dataclass(slots=True, eq=False)
class _Copy:
    """A copy on the stream."""

    event: int
    table: object = None
    """What the kernel reads, kept until it has."""


@dataclass(slots=True)
class _Mapping:
    """An allocation of another process."""

    base: int
    users: int = field(default=0)


class CudaDevice:
    """See Device."""

    def __init__(self, index: int, on_passed: Callable[[], None]) -> None:
        """`on_passed` is called from a thread of the driver whenever a copy has ended.

        Raises:
            TransferError: there is no such device.
        """
        self._runtime = cuda_runtime()
        if index >= num_devices(self._runtime):
            raise TransferError(f"there is no device cuda:{index} here")
        self._index = index
        self._on_passed = on_passed
        self.uuid = device_uuid(self._runtime, index)
        self._stream: int | None = None
        self._bell: int | None = None
        """A second stream, on which the driver calls us: on the first one the next copy would wait for that."""
        self._spare: list[int] = []
        """Events that may be recorded again."""
        self._mappings: dict[bytes, _Mapping] = {}

    def export(self, region: Region) -> bytes:
        memory = region.device
        if memory is None or memory.device != self._index:
            raise TransferError(f"the region is not on cuda:{self._index}, where the others are")
        self._runtime.setDevice(self._index)
        try:
            base = _allocation_base(memory.pointer)
            allocation = self._runtime.ipcGetMemHandle(memory.pointer)
        except (OSError, self._runtime.CUDARuntimeError) as error:
            raise TransferError(
                f"the region cannot be exported: {error}; it must be of cudaMalloc (cuda_memory.CudaPool), "
                "not of torch's expandable segments"
            ) from error
        return Handle(self.uuid, bytes(allocation), memory.pointer - base).pack()

    def why_unreachable(self, uuid: bytes) -> str | None:
        if uuid == self.uuid:
            return None
        for index in range(num_devices(self._runtime)):
            if device_uuid(self._runtime, index) == uuid:
                if self._runtime.deviceCanAccessPeer(self._index, index):
                    return None
                return f"cuda:{self._index} has no peer access to the peer's GPU, cuda:{index} here"
        return f"the peer's GPU {uuid.hex()} is not visible in this process; see CUDA_VISIBLE_DEVICES"

    def map(self, handle: bytes, num_bytes: int) -> int:
        told = Handle.unpack(handle)
        mapping = self._mappings.get(told.allocation)
        if mapping is None:
            self._runtime.setDevice(self._index)
            try:
                base = self._runtime.ipcOpenMemHandle(
                    told.allocation, self._runtime.cudaIpcMemLazyEnablePeerAccess
                )
            except self._runtime.CUDARuntimeError as error:
                raise TransferError(f"the peer's memory cannot be mapped: {error}") from error
            mapping = self._mappings[told.allocation] = _Mapping(base)
        mapping.users += 1
        return mapping.base + told.offset

    def unmap_all(self, handles: list[bytes]) -> None:
        self._runtime.setDevice(self._index)
        for handle in handles:
            allocation = Handle.unpack(handle).allocation
            mapping = self._mappings[allocation]
            mapping.users -= 1
            if mapping.users == 0:
                del self._mappings[allocation]
                self._runtime.ipcCloseMemHandle(mapping.base)

    def address(self, region: Region) -> int:
        if region.device is None:
            raise TransferError("the region is not memory of a device")
        return region.device.pointer

    def copy(self, runs: Runs) -> object:
        runtime = self._runtime
        runtime.setDevice(self._index)
        try:
            if self._stream is None:
                self._stream = runtime.streamCreateWithFlags(runtime.streamNonBlocking)
                self._bell = runtime.streamCreateWithFlags(runtime.streamNonBlocking)
            table = None
            if len(runs) <= FEW_RUNS or runs[:, 2].mean() >= LONG_RUN_BYTES:
                for source, target, length in runs.tolist():
                    runtime.memcpyAsync(target, source, length, runtime.memcpyDeviceToDevice, self._stream)
            else:
                from ..kernels.copy_runs_triton import copy_runs_on_stream

                table = copy_runs_on_stream(runs, self._index, self._stream)
            if self._spare:
                event = self._spare.pop()
            else:
                event = runtime.eventCreateWithFlags(runtime.eventDisableTiming)
            runtime.eventRecord(event, self._stream)
            runtime.streamWaitEvent(self._bell, event)
            runtime.launchHostFunc(self._bell, self._ring, 0)
        except runtime.CUDARuntimeError as error:
            raise TransferError(f"the device copy failed: {error}") from error
        return _Copy(event, table)

    def passed(self, copy: object) -> bool:
        assert isinstance(copy, _Copy)  # it came from copy()
        self._runtime.setDevice(self._index)
        status = self._runtime.eventQuery(copy.event)
        if status == NOT_READY:
            return False
        if status != 0:
            raise TransferError(f"the device copy failed: {self._runtime.CUDARuntimeError(status)}")
        self._spare.append(copy.event)
        return True

    def close(self) -> None:
        runtime = self._runtime
        runtime.setDevice(self._index)
        for stream in (self._stream, self._bell):
            if stream is not None:
                runtime.streamSynchronize(stream)
                runtime.streamDestroy(stream)
        self._stream = self._bell = None
        for event in self._spare:
            runtime.eventDestroy(event)
        self._spare.clear()
        for mapping in self._mappings.values():
            runtime.ipcCloseMemHandle(mapping.base)
        self._mappings.clear()

    def _ring(self, _: int) -> None:
        self._on_passed()


DeviceFactory = Callable[[Region, Callable[[], None]], Device]
"""The device that a region is on, and what to call, from any thread, when a copy has ended.

Raises:
    TransferError: the region is on none.
"""


def cuda_device_of(region: Region, on_passed: Callable[[], None]) -> Device:
    """See DeviceFactory."""
    if region.device is None:
        raise TransferError("the region is memory of the host, and this transport moves memory of a GPU")
    return CudaDevice(region.device.device, on_passed)


def _allocation_base(pointer: int) -> int:
    """Where the allocation begins that `pointer` lies in; the runtime has no call for it, the driver has.

    Raises:
        OSError: there is no driver, or no such allocation.
    """
    base, size = ctypes.c_uint64(), ctypes.c_size_t()
    code = ctypes.CDLL("libcuda.so.1").cuMemGetAddressRange_v2(
        ctypes.byref(base), ctypes.byref(size), ctypes.c_uint64(pointer)
    )
    if code != 0:
        raise OSError(code, f"cuMemGetAddressRange({pointer:#x}) returns {code}")
    return base.value
