"""Memory of a GPU, by CuPy's runtime: a pool that other processes of the host may map, how they name it, and
what a transport asks of the device it is on. Knows no peers and no transfers."""

from __future__ import annotations

import ctypes
import struct
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ...proto.errors import ConfigError, TransferError
from ..base import DeviceMemory, Region

Runs = NDArray[np.int64]
"""[n, 3]: source address, target address, length; bytes."""

_HANDLE = struct.Struct("<16s64sQ")


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

    def prepare(self) -> None:
        """Does now what the first copy would wait for. Blocks.

        Raises:
            TransferError: the device cannot copy.
        """
        ...

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
    """16 bytes; CuPy leaves out what follows a zero."""
    return bytes(runtime.getDeviceProperties(index)["uuid"]).ljust(16, b"\0")


def index_of(runtime: Any, uuid: bytes) -> int | None:
    """Which of the visible devices it is, if any."""
    return next((i for i in range(num_devices(runtime)) if device_uuid(runtime, i) == uuid), None)


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


def allocation_base(pointer: int) -> int:
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
