"""Whether a process that could write into our memory is gone for good. The end of its socket proves nothing
where a device does the writing: the kernel closes a dying process's files one by one, and what it had given
to the device runs on until the driver's turn has come."""

from __future__ import annotations

import os
import select
import weakref

from ...proto.errors import TransferError

_FLAGS = 6
"""Index of `flags` in /proc/PID/stat, counted behind the name (proc(5): field 9)."""
_PF_EXITING = 0x4


class PeerProcess:
    """Another process of this machine and user."""

    def __init__(self, pid: int) -> None:
        """
        Raises:
            TransferError: there is none.
        """
        self._pid = pid
        try:
            self._fd = os.pidfd_open(pid)
        except (OSError, OverflowError) as error:
            raise TransferError(f"pid: there is no process {pid} here ({error})") from error
        self.close = weakref.finalize(self, os.close, self._fd)

    @property
    def is_dying(self) -> bool:
        """It ends and has not ended: its files are being closed. False before, and afterwards."""
        if self._ended():
            return False
        try:
            with open(f"/proc/{self._pid}/stat", encoding="utf-8", errors="replace") as file:
                fields = file.read().rpartition(")")[2].split()
        except OSError:
            return not self._ended()
        return bool(int(fields[_FLAGS]) & _PF_EXITING)

    def _ended(self) -> bool:
        return bool(select.select([self._fd], [], [], 0.0)[0])
