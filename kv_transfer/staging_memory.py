"""The memory of a staging buffer on a host without a GPU: a memfd, so that another process may map it. Its
pages are taken when they are used."""

from __future__ import annotations

import mmap
import os

from .base import Region


class StagingMemory:
    """Owns the descriptor and the mapping."""

    def __init__(self, size_bytes: int) -> None:
        self._fd: int | None = os.memfd_create("diphase-staging", os.MFD_CLOEXEC)
        os.ftruncate(self._fd, size_bytes)
        self.region = Region(buffer=memoryview(mmap.mmap(self._fd, size_bytes)), fd=self._fd)

    def close(self) -> None:
        """Closes the descriptor; the memory ends with the last view of it. Idempotent."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
