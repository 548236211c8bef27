"""NCCL by CuPy, for the owner process (nccl_owner.py): one pair, one direction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...proto.errors import DiphaseError, InternalError, PeerLost, TransferError
from .cuda_device import CudaDevice
from .cuda_memory import Handle, cuda_runtime, index_of

NOT_READY = 600
"""cudaErrorNotReady."""
MAX_GROUP = 256
"""Sends or receives that NCCL takes at a time; a group costs memory and time before its first byte moves."""


def from_nccl(status: int, message: str) -> DiphaseError:
    """Our error for ncclResult_t."""
    if status == 6:  # ncclRemoteError
        return PeerLost(f"the other end of the communicator failed: {message}")
    if status in (1, 2):  # ncclUnhandledCudaError, ncclSystemError
        return TransferError(f"NCCL failed on this machine: {message}; NCCL_DEBUG=INFO tells more")
    if status == 5:  # ncclInvalidUsage
        return TransferError(f"NCCL refuses: {message}; it takes two different GPUs")
    return InternalError(f"NCCL was used wrongly: {message}")


def load_nccl() -> Any:
    """CuPy's bindings of NCCL; they can be imported without a driver.

    Raises:
        TransferError: the library is not installed.
    """
    try:
        from cupy.cuda import nccl
    except ImportError as error:
        raise TransferError(f"{error}; pip install diphase[cuda]") from error
    if not nccl.available:
        raise TransferError("CuPy finds no NCCL here; pip install nvidia-nccl-cu13")
    return nccl


class CupyCommunicator:
    """See nccl_owner.Communicator. Rank 0 sends, rank 1 receives; without runs, one byte the other way."""

    def __init__(self) -> None:
        """
        Raises:
            TransferError: the library is not installed.
        """
        self._nccl = load_nccl()
        self._runtime = cuda_runtime()
        self._device: CudaDevice | None = None
        self._index = 0
        self._bases: list[int] = []
        self._rank = 0
        self._communicator: Any = None
        self._stream = 0
        self._scratch = 0
        self._spare: list[int] = []

    def map(self, handle: bytes, num_bytes: int) -> None:
        if self._device is None:
            uuid = Handle.unpack(handle).device
            index = index_of(self._runtime, uuid)
            if index is None:
                raise TransferError(f"GPU {uuid.hex()} is not visible in the owner process")
            self._index = index
            self._device = CudaDevice(self._index, _nobody)
        self._bases.append(self._device.map(handle, num_bytes))

    def name(self) -> bytes:
        try:
            return bytes(self._nccl.get_unique_id())
        except self._nccl.NcclError as error:
            raise from_nccl(error.status, str(error)) from error

    def open(self, unique_id: bytes, rank: int) -> None:
        runtime = self._runtime
        try:
            runtime.setDevice(self._index)
            self._rank = rank
            self._communicator = self._nccl.NcclCommunicator(2, unique_id, rank)
            self._stream = runtime.streamCreateWithFlags(runtime.streamNonBlocking)
            self._scratch = runtime.malloc(1)
        except self._nccl.NcclError as error:
            raise from_nccl(error.status, str(error)) from error
        except runtime.CUDARuntimeError as error:
            raise TransferError(f"the communicator's device failed: {error}") from error

    def move(self, runs: Sequence[tuple[int, int, int]]) -> object:
        runtime = self._runtime
        sends = self._rank == 0
        places = [(self._bases[region] + offset, length) for region, offset, length in runs]
        if not places:
            sends, places = not sends, [(self._scratch, 1)]
        post = self._communicator.send if sends else self._communicator.recv
        try:
            for first in range(0, len(places), MAX_GROUP):
                self._nccl.groupStart()
                for address, length in places[first : first + MAX_GROUP]:
                    post(address, length, self._nccl.NCCL_UINT8, 1 - self._rank, self._stream)
                self._nccl.groupEnd()
            if self._spare:
                event = self._spare.pop()
            else:
                event = runtime.eventCreateWithFlags(runtime.eventDisableTiming)
            runtime.eventRecord(event, self._stream)
        except self._nccl.NcclError as error:
            raise from_nccl(error.status, str(error)) from error
        except runtime.CUDARuntimeError as error:
            raise TransferError(f"the communicator's device failed: {error}") from error
        return event

    def passed(self, posted: object) -> bool:
        assert isinstance(posted, int)  # an event, from move()
        try:
            self._communicator.check_async_error()
        except self._nccl.NcclError as error:
            raise from_nccl(error.status, str(error)) from error
        status = self._runtime.eventQuery(posted)
        if status not in (0, NOT_READY):
            raise TransferError(f"the communicator's device failed: CUDA error {status}")
        if status == 0:
            self._spare.append(posted)
        return bool(status == 0)

    def close(self) -> None:
        if self._communicator is not None:
            self._communicator.abort()


def _nobody() -> None:
    """Nothing is copied by the device itself here."""
