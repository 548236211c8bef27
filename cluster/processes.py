"""Which processes belong to a cluster, and when one ends: /proc and pidfds. Knows no roles and no Ray.

A cluster on a machine has a name, its *mark*. A process belongs to it when it has a file open for writing
in the cluster's folder, as all that Ray and the store start there do (their logs), or a memfd of that name,
which processes of our own open (`bear`). Environment variables would be easier to see, but Ray's process
titles are written over them.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from pathlib import Path
from typing import Any


def bear(mark: str) -> int:
    """Makes this process one of the cluster's until it ends; the memfd that shows it."""
    return os.memfd_create(mark)


def start_apart(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
    """Popen of a process that a Ctrl-C in the terminal does not reach: the supervisor decides when it
    ends."""
    # Blocked as well, for a Ctrl-C that comes between fork and the new session.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return subprocess.Popen(command, start_new_session=True, **options)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def marked(mark: str) -> list[int]:
    """Ids of the living processes of this user that belong to the cluster, this one excepted."""
    return sorted(
        int(entry.name)
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit() and int(entry.name) != os.getpid() and _belongs(entry, mark)
    )


def _belongs(process: Path, mark: str) -> bool:
    try:
        for link in (process / "fd").iterdir():
            target = os.readlink(link)
            if f"/{mark}/" in target or target.startswith(f"/memfd:{mark} "):
                # Whoever only reads a log there is a guest.
                info = (process / "fdinfo" / link.name).read_text()
                flags = next(line.split()[1] for line in info.splitlines() if line.startswith("flags:"))
                if int(flags, 8) & os.O_ACCMODE != os.O_RDONLY:
                    return True
    except OSError:  # gone, or another user's
        pass
    return False


def started_at(pid: int) -> int | None:
    """Clock ticks since boot at which the process started; with the pid it names a process for good.

    None: there is no such process, or it is a zombie.
    """
    try:
        # The name in parentheses may hold spaces and parentheses itself.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[19])


def kill(pid: int, ticks: int) -> bool:
    """SIGKILL to the process that started at `ticks`; False when it is gone already."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    try:
        # Between open and check the pid cannot pass to another process that the handle would name.
        if started_at(pid) != ticks:
            return False
        signal.pidfd_send_signal(handle, signal.SIGKILL)
    except ProcessLookupError:
        return False
    finally:
        os.close(handle)
    return True


async def wait_exit(pid: int, ticks: int) -> None:
    """Returns once the process that started at `ticks` has ended, within milliseconds."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(handle, ended.set)
    try:
        if started_at(pid) == ticks:
            await ended.wait()
    finally:
        loop.remove_reader(handle)
        os.close(handle)
