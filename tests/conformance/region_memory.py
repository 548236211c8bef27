"""Memory that tests give to transports, of the host or of a GPU, with its bytes at hand."""

from __future__ import annotations

import importlib.util
import mmap
import os
from typing import Any, Protocol

import numpy as np
from diphase.kv_transfer.base import Region
from diphase.kv_transfer.transports.cuda_memory import CudaPool, cuda_runtime, num_devices
from diphase.proto.errors import TransferError
from numpy.typing import NDArray

ON_GPU = " on a GPU"
"""Behind the name of a transport: its memory is a GPU's."""


class Memory(Protocol):
    bytes: Any
    """Like a numpy array of uint8."""
    region: Region

    def close(self) -> None: ...


class HostMemory:
    """A memfd."""

    def __init__(self, name: str, size: int) -> None:
        self._fd = os.memfd_create(name)
        os.ftruncate(self._fd, size)
        buffer = memoryview(mmap.mmap(self._fd, size))
        self.bytes = np.frombuffer(buffer, dtype=np.uint8)
        self.region = Region(buffer=buffer, fd=self._fd)

    def close(self) -> None:
        os.close(self._fd)


class GpuBytes:
    """What tests do with an array, done with copies from and to a pool on a GPU."""

    def __init__(self, pool: CudaPool) -> None:
        self._pool = pool
        self._runtime = cuda_runtime()

    def __getitem__(self, part: slice) -> NDArray[np.uint8]:
        begin, end, _ = part.indices(self._pool.num_bytes)
        found = np.empty(end - begin, dtype=np.uint8)
        self._copy(found.ctypes.data, self._pool.pointer + begin, found.nbytes)
        return found

    def __setitem__(self, part: slice, value: Any) -> None:
        begin, end, _ = part.indices(self._pool.num_bytes)
        given = np.empty(end - begin, dtype=np.uint8)
        given[:] = value
        self._copy(self._pool.pointer + begin, given.ctypes.data, given.nbytes)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return self[:].astype(dtype or np.uint8)

    def __eq__(self, other: object) -> Any:
        return self[:] == other

    __hash__ = None  # type: ignore[assignment]

    def any(self) -> bool:
        return bool(self[:].any())

    def sum(self, dtype: Any) -> Any:
        return self[:].sum(dtype=dtype)

    def _copy(self, target: int, source: int, num_bytes: int) -> None:
        self._runtime.setDevice(self._pool.device)
        self._runtime.memcpy(target, source, num_bytes, self._runtime.memcpyDefault)
        self._runtime.deviceSynchronize()


class GpuMemory:
    """A pool of its own on a GPU, all zeros."""

    def __init__(self, size: int, device: int = 0) -> None:
        self._pool = CudaPool(device, size)
        self.bytes = GpuBytes(self._pool)
        self.bytes[:] = 0
        self.region = self._pool.region

    def close(self) -> None:
        self._pool.close()


def make_memory(transport: str, name: str, size: int) -> Memory:
    return GpuMemory(size) if transport.endswith(ON_GPU) else HostMemory(name, size)


def num_gpus() -> int:
    if importlib.util.find_spec("cupy") is None:
        return 0
    try:
        return num_devices(cuda_runtime())
    except TransferError:
        return 0
