"""What UCX says about itself: which lanes it has chosen, and what goes wrong. It says so in its log and
nowhere else; the log goes into a file without a name, from which it is read back. Knows no transfers."""

from __future__ import annotations

import ctypes
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

_LINE = re.compile(r"\[\d+\.\d+\] \[[^\]]*\]\s+(?P<text>.*)")
_COMPLAINT = re.compile(r"\S+:\d+\s+UCX\s+(WARN|ERROR|FATAL)\s+(?P<what>.*)")
_WRITES = re.compile(r"remote memory write by ucp_put\S* from (?P<memory>.*)")

_log = logging.getLogger(__name__)


class UcxReport:
    """One for a process: UCX opens its log once, when it is loaded."""

    def __init__(self) -> None:
        self._fd: int | None = None
        self._position = 0
        self._rest = ""
        self._connection = ""
        """Whose table is being read."""
        self._memory: str | None = None
        """Between what, if the table is about writes."""
        self._told: set[str] = set()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """UCX is to be loaded within. Its settings are in the environment no longer than that: processes
        started later would take the descriptor for theirs. Who has configured UCX's log, or loaded UCX
        before, keeps it as it is."""
        if self._fd is not None or "UCX_LOG_FILE" in os.environ or _ucx_is_loaded():
            yield
            return
        self._fd = os.memfd_create("ucx-log")
        asked = os.environ.get("UCX_PROTO_INFO")
        os.environ.update(UCX_LOG_FILE=f"/proc/self/fd/{self._fd}", UCX_PROTO_INFO=asked or "y")
        try:
            yield
        finally:
            del os.environ["UCX_LOG_FILE"]
            if asked is None:
                del os.environ["UCX_PROTO_INFO"]

    def tell(self) -> None:
        """Logs what UCX has said since the last time: its choices of lanes, each once, and complaints."""
        for choice in self.read(self._new_text()):
            if choice not in self._told:
                self._told.add(choice)
                _log.info("ucx_lanes %s", choice)

    def read(self, text: str) -> list[str]:
        """Choices of lanes for writes to peers in the next piece of the log.

        UCX prints a table for each kind of connection ("cfg") and operation: two lines of title in one
        column, then rows of three columns: range of sizes, protocol, lanes.
        """
        *lines, self._rest = (self._rest + text).split("\n")
        choices = []
        for line in (match["text"] for line in lines if (match := _LINE.match(line))):
            if complaint := _COMPLAINT.match(line):
                _log.warning("ucx_complains what=%r", complaint["what"])
            if not line.startswith("|"):
                continue
            cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
            if len(cells) == 1 and "cfg#" in cells[0]:
                self._connection, self._memory = cells[0], None
            elif len(cells) == 1:
                writes = _WRITES.match(cells[0])
                self._memory = writes["memory"] if writes else None
            elif self._memory and cells[0] != "Range" and " self " not in self._connection:
                choices.append(
                    f"connection={self._connection!r} memory={self._memory!r} bytes={cells[0]} "
                    f"lanes={' '.join(cells[1:])!r}"
                )
        return choices

    def _new_text(self) -> str:
        if self._fd is None:
            return ""
        ctypes.CDLL(None).fflush(None)  # what UCX has said waits in the buffer of a C stream
        data = os.pread(self._fd, os.fstat(self._fd).st_size - self._position, self._position)
        self._position += len(data)
        return data.decode(errors="replace")


def _ucx_is_loaded() -> bool:
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        return any("/libucs" in line for line in maps)


REPORT = UcxReport()
