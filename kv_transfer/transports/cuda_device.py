"""One GPU by CuPy's runtime: exports and maps memory, and copies on a stream of its own. Knows no peers and
no transfers. Every call names its device first: the current one is a thread's own."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

from ...proto.errors import TransferError
from ..base import Region
from .cuda_memory import (
    Device,
    Handle,
    Runs,
    allocation_base,
    cuda_runtime,
    device_uuid,
    index_of,
    num_devices,
)

LONG_RUN_BYTES = 256 * 1024
"""From this average on, runs are copied one by one; below, one kernel copies all: a call for each 16 KiB
costs a hundred times what its bytes do."""
FEW_RUNS = 4
"""So few are copied one by one in any case."""

_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Copy:
    """A copy on the stream."""

    event: int
    kept: object
    """What it reads beside the memory itself."""
    has_ended: bool = False
    error: str | None = None


@dataclass(slots=True)
class _Mapping:
    """An allocation that is mapped here."""

    base: int
    is_own: bool
    """This process's: CUDA opens only those of others."""
    users: int = 0


_exported: dict[bytes, int] = {}
"""Allocations of this process that were exported, and where they begin."""


class CudaDevice:
    """See Device. A thread of its own waits for the events: the driver could call us back, but a callback
    that needs the interpreter's lock, while who has it waits for the device, would never return."""

    def __init__(self, index: int, on_passed: Callable[[], None]) -> None:
        """`on_passed` is called from a thread of this object whenever a copy has ended.

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
        self._waiter: threading.Thread | None = None
        self._begun: queue.SimpleQueue[_Copy | None] = queue.SimpleQueue()
        self._spare: list[int] = []
        """Events that may be recorded again."""
        self._mappings: dict[bytes, _Mapping] = {}

    def prepare(self) -> None:
        from ...kernels import copy_runs_triton

        try:
            copy_runs_triton.prepare(self._index)
        except RuntimeError as error:
            raise TransferError(
                f"the copy kernel cannot be compiled for cuda:{self._index}: {error}"
            ) from error

    def export(self, region: Region) -> bytes:
        memory = region.device
        if memory is None or memory.device != self._index:
            raise TransferError(f"the region is not on cuda:{self._index}, where the others are")
        self._runtime.setDevice(self._index)
        try:
            base = allocation_base(memory.pointer)
            allocation = self._runtime.ipcGetMemHandle(memory.pointer)
        except (OSError, self._runtime.CUDARuntimeError) as error:
            raise TransferError(
                f"the region cannot be exported: {error}; it must be of cudaMalloc (cuda_memory.CudaPool), "
                "not of torch's expandable segments"
            ) from error
        _exported[bytes(allocation)] = base
        return Handle(self.uuid, bytes(allocation), memory.pointer - base).pack()

    def why_unreachable(self, uuid: bytes) -> str | None:
        if uuid == self.uuid:
            return None
        index = index_of(self._runtime, uuid)
        if index is None:
            return f"the peer's GPU {uuid.hex()} is not visible in this process; see CUDA_VISIBLE_DEVICES"
        if not self._runtime.deviceCanAccessPeer(self._index, index):
            return f"cuda:{self._index} has no peer access to the peer's GPU, cuda:{index} here"
        return None

    def map(self, handle: bytes, num_bytes: int) -> int:
        told = Handle.unpack(handle)
        mapping = self._mappings.get(told.allocation)
        if mapping is None:
            is_own = told.allocation in _exported
            base = self._reach(told) if is_own else self._open(told.allocation)
            mapping = self._mappings[told.allocation] = _Mapping(base, is_own)
        mapping.users += 1
        return mapping.base + told.offset

    def unmap_all(self, handles: list[bytes]) -> None:
        for handle in handles:
            allocation = Handle.unpack(handle).allocation
            mapping = self._mappings[allocation]
            mapping.users -= 1
            if mapping.users == 0:
                self._close(self._mappings.pop(allocation))

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
                self._waiter = threading.Thread(target=self._wait, name="kv-cuda", daemon=True)
                self._waiter.start()
            kept: object = None
            if len(runs) <= FEW_RUNS or runs[:, 2].mean() >= LONG_RUN_BYTES:
                for source, target, length in runs.tolist():
                    runtime.memcpyAsync(target, source, length, runtime.memcpyDeviceToDevice, self._stream)
            else:
                from ...kernels.copy_runs_triton import copy_runs_on_stream

                kept = copy_runs_on_stream(runs, self._index, self._stream)
            event = self._spare.pop() if self._spare else self._new_event()
            runtime.eventRecord(event, self._stream)
        except RuntimeError as error:  # CUDARuntimeError is one; torch and triton have others
            raise TransferError(f"the device copy failed: {error}") from error
        copy = _Copy(event, kept)
        self._begun.put(copy)
        return copy

    def passed(self, copy: object) -> bool:
        assert isinstance(copy, _Copy)  # it came from copy()
        if copy.error is not None:
            raise TransferError(f"the device copy failed: {copy.error}")
        if copy.has_ended:
            self._spare.append(copy.event)
        return copy.has_ended

    def close(self) -> None:
        self._runtime.setDevice(self._index)
        if self._waiter is not None:
            self._begun.put(None)
            self._waiter.join()
            self._waiter = None
        for mapping in self._mappings.values():
            self._close(mapping)
        self._mappings.clear()
        if self._stream is not None:
            self._try(self._runtime.streamDestroy, self._stream)
            self._stream = None
        while self._spare:
            self._try(self._runtime.eventDestroy, self._spare.pop())

    def _wait(self) -> None:
        """Waits for the copies, one after the other, with the interpreter's lock released."""
        self._runtime.setDevice(self._index)
        while (copy := self._begun.get()) is not None:
            try:
                self._runtime.eventSynchronize(copy.event)
                copy.has_ended = True
            except self._runtime.CUDARuntimeError as error:
                copy.error = str(error)
            self._on_passed()

    def _new_event(self) -> int:
        runtime = self._runtime
        event: int = runtime.eventCreateWithFlags(runtime.eventDisableTiming | runtime.eventBlockingSync)
        return event

    def _reach(self, own: Handle) -> int:
        """
        Raises:
            TransferError: this device has no access to that memory of this process.
        """
        index = index_of(self._runtime, own.device)
        if index is not None and index != self._index:
            self._runtime.setDevice(self._index)
            try:
                self._runtime._deviceEnsurePeerAccess(index)
            except self._runtime.CUDARuntimeError as error:
                raise TransferError(f"cuda:{self._index} cannot reach cuda:{index}: {error}") from error
        return _exported[own.allocation]

    def _open(self, allocation: bytes) -> int:
        """
        Raises:
            TransferError: it cannot be mapped.
        """
        runtime = self._runtime
        runtime.setDevice(self._index)
        try:
            base: int = runtime.ipcOpenMemHandle(allocation, runtime.cudaIpcMemLazyEnablePeerAccess)
        except runtime.CUDARuntimeError as error:
            raise TransferError(f"the peer's memory cannot be mapped: {error}") from error
        return base

    def _close(self, mapping: _Mapping) -> None:
        if not mapping.is_own:
            self._runtime.setDevice(self._index)
            self._try(self._runtime.ipcCloseMemHandle, mapping.base)

    def _try(self, end: Callable[[int], None], what: int) -> None:
        """On a device that has failed, everything does."""
        try:
            end(what)
        except self._runtime.CUDARuntimeError as error:
            _log.warning("cuda_cleanup_failed device=%d why=%r", self._index, str(error))


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
