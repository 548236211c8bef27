"""CuPy's CUDA runtime and NCCL over the host's memory, as far as this package calls them. That the real ones
have these names is tested where CuPy is installed; what they do is where a GPU is."""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

DEVICES = [bytes([number] * 12 + [0] * 4) for number in (1, 2, 3)]


class CUDARuntimeError(RuntimeError):
    def __init__(self, status: int) -> None:
        super().__init__(f"cudaError {status}")
        self.status = status


class Runtime:
    """One for each process that a test plays; `memory` is what they have in common."""

    CUDARuntimeError = CUDARuntimeError
    cudaIpcMemLazyEnablePeerAccess = 1
    memcpyDeviceToDevice = 3
    streamNonBlocking = 1
    eventDisableTiming = 2
    eventBlockingSync = 1

    def __init__(self, allocations: dict[int, Any] | None = None, num_devices: int = 2) -> None:
        self.allocations = {} if allocations is None else allocations
        self._num_devices = num_devices
        self._ids = itertools.count(1)
        self.current = threading.local()
        self.may_end = threading.Event()
        """Cleared, what is on a stream does not end."""
        self.may_end.set()
        self.fails_with: int | None = None
        self.opened: list[int] = []
        self.closed: list[int] = []
        self.copies: list[int] = []
        """Lengths."""
        self.alive: set[int] = set()
        """Streams and events."""
        self.peers: list[tuple[int, int]] = []

    def getDeviceCount(self) -> int:
        if self._num_devices < 0:
            raise CUDARuntimeError(35)
        return self._num_devices

    def getDeviceProperties(self, index: int) -> dict[str, Any]:
        return {"uuid": DEVICES[index].rstrip(b"\0")}

    def deviceCanAccessPeer(self, device: int, peer: int) -> int:
        return int(peer != 2)

    def _deviceEnsurePeerAccess(self, peer: int) -> None:
        self.peers.append((self.current.device, peer))

    def setDevice(self, device: int) -> None:
        self.current.device = device

    def malloc(self, num_bytes: int) -> int:
        if num_bytes > 1 << 30:
            raise CUDARuntimeError(2)
        memory = ctypes.create_string_buffer(num_bytes)
        self.allocations[ctypes.addressof(memory)] = memory
        return ctypes.addressof(memory)

    def free(self, pointer: int) -> None:
        del self.allocations[pointer]

    def base_of(self, pointer: int) -> int:
        """What the driver's cuMemGetAddressRange would say."""
        for base, memory in self.allocations.items():
            if base <= pointer < base + len(memory):
                return base
        raise OSError(1, f"cuMemGetAddressRange({pointer:#x}) returns 1")

    def ipcGetMemHandle(self, pointer: int) -> bytes:
        return self.base_of(pointer).to_bytes(64, "little")

    def ipcOpenMemHandle(self, handle: bytes, flags: int) -> int:
        base = int.from_bytes(handle, "little")
        if base not in self.allocations:
            raise CUDARuntimeError(400)
        self.opened.append(base)
        return base

    def ipcCloseMemHandle(self, base: int) -> None:
        self.closed.append(base)

    def streamCreateWithFlags(self, flags: int) -> int:
        return self._new()

    def streamDestroy(self, stream: int) -> None:
        self.alive.remove(stream)

    def eventCreateWithFlags(self, flags: int) -> int:
        assert flags & self.eventDisableTiming
        return self._new()

    def eventRecord(self, event: int, stream: int) -> None:
        assert {event, stream} <= self.alive

    def eventSynchronize(self, event: int) -> None:
        assert event in self.alive
        self.may_end.wait()
        self._check()

    def eventQuery(self, event: int) -> int:
        assert event in self.alive
        return self.fails_with or (0 if self.may_end.is_set() else 600)

    def eventDestroy(self, event: int) -> None:
        self.alive.remove(event)

    def memcpyAsync(self, target: int, source: int, num_bytes: int, kind: int, stream: int) -> None:
        assert kind == 3
        assert stream in self.alive
        self._check()
        ctypes.memmove(target, source, num_bytes)
        self.copies.append(num_bytes)

    def _new(self) -> int:
        self.alive.add(number := next(self._ids))
        return number

    def _check(self) -> None:
        if self.fails_with is not None:
            raise CUDARuntimeError(self.fails_with)


class NcclError(RuntimeError):
    def __init__(self, status: int) -> None:
        super().__init__(f"NCCL_ERROR {status}")
        self.status = status


class Nccl:
    """What one process calls; notes it."""

    NcclError = NcclError
    NCCL_UINT8 = 1

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.fails_with: int | None = None

    def get_unique_id(self) -> bytes:
        return bytes(128)

    def groupStart(self) -> None:
        self.calls.append(("group",))

    def groupEnd(self) -> None:
        self.calls.append(("end",))

    def NcclCommunicator(self, size: int, unique_id: bytes, rank: int) -> Any:
        self._check()
        self.calls.append(("open", size, len(unique_id), rank))

        def note(name: str) -> Callable[..., None]:
            return lambda *args: self.calls.append((name, *args))

        return SimpleNamespace(
            send=note("send"), recv=note("recv"), abort=note("abort"), check_async_error=self._check
        )

    def _check(self) -> None:
        if self.fails_with is not None:
            raise NcclError(self.fails_with)
