"""A GPU without one: memory is memfds, a stream is a thread. With it, and with host_communicator.py, the
transports around CUDA and NCCL are tested on any machine; the libraries are where the marker `gpu` is."""

from __future__ import annotations

import ctypes
import mmap
import os
import queue
import threading
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np
from diphase.kv_transfer.base import Region, Transport, TransportContext
from diphase.kv_transfer.registry import load_factory
from diphase.kv_transfer.transports.cuda_ipc import CudaIpcTransport
from diphase.kv_transfer.transports.cuda_memory import Runs
from diphase.kv_transfer.transports.nccl import NcclTransport
from diphase.proto.errors import TransferError

from .host_communicator import HANDLE, map_region
from .region_memory import ON_GPU

HOST_COMMUNICATOR = "tests.conformance.host_communicator:HostCommunicator"
"""Found by owner processes in ROOT."""
ROOT = Path(__file__).resolve().parents[2]
DOUBLED = ("cuda_ipc", "nccl")


def export_region(region: Region) -> bytes:
    assert region.fd is not None
    return HANDLE.pack(os.getpid(), region.fd)


class HostDevice:
    """See cuda_memory.Device: every process has one of its own, and each can reach the others."""

    def __init__(self, region: Region, on_passed: Callable[[], None]) -> None:
        self.uuid = uuid.uuid4().bytes
        self._on_passed = on_passed
        self._queue: queue.SimpleQueue[tuple[Runs, threading.Event] | None] = queue.SimpleQueue()
        self._stream = threading.Thread(target=self._run, daemon=True)
        self._stream.start()
        self._maps: list[mmap.mmap] = []
        self.may_run = threading.Event()
        """Cleared, the stream stands still."""
        self.may_run.set()
        self.is_broken = False

    def prepare(self) -> None:
        """There is nothing to compile."""

    def export(self, region: Region) -> bytes:
        return export_region(region)

    def why_unreachable(self, uuid: bytes) -> str | None:
        return None if len(uuid) == 16 else "that is no UUID"

    def map(self, handle: bytes, num_bytes: int) -> int:
        self._maps.append(map_region(handle, num_bytes))
        return address_of(memoryview(self._maps[-1]))

    def unmap_all(self, handles: list[bytes]) -> None:
        """Mappings stay until the end of the process: addresses of them are about."""

    def address(self, region: Region) -> int:
        return address_of(region.host_bytes())

    def copy(self, runs: Runs) -> object:
        self._check()
        passed = threading.Event()
        self._queue.put((runs, passed))
        return passed

    def passed(self, copy: object) -> bool:
        assert isinstance(copy, threading.Event)
        self._check()
        return copy.is_set()

    def _check(self) -> None:
        if self.is_broken:
            raise TransferError("the device copy failed: it has fallen off the bus")

    def close(self) -> None:
        self._queue.put(None)
        self.may_run.set()
        self._stream.join()

    def _run(self) -> None:
        while (given := self._queue.get()) is not None:
            runs, passed = given
            self.may_run.wait()
            for source, target, length in runs.tolist():
                ctypes.memmove(target, source, length)
            passed.set()
            self._on_passed()


def address_of(buffer: memoryview) -> int:
    return np.frombuffer(buffer, dtype=np.uint8).ctypes.data


def make_transport(name: str, context: TransportContext) -> Transport:
    """The transport of that name; those for GPUs with the doubles above, unless the name ends with ON_GPU."""
    if name == "cuda_ipc":
        return CudaIpcTransport(context, device_of=HostDevice)
    if name == "nccl":
        os.environ["PYTHONPATH"] = str(ROOT)
        return NcclTransport(context, device_of=HostDevice, communicator=HOST_COMMUNICATOR)
    return load_factory(name.removesuffix(ON_GPU))(context)
