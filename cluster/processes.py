"""Which processes belong to a cluster, and when one ends: /proc and pidfds. Knows no roles and no Ray.

Every process that a supervisor starts carries the cluster's name in its environment (`MARK`); children
inherit it. That is how a cluster finds its own processes, and only those, on a machine where other clusters
run.
"""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

MARK = "DIPHASE_CLUSTER"
"""Environment variable that every process of a cluster has."""


def marked(cluster: str) -> list[int]:
    """Ids of the living processes of this user that carry the cluster's mark, this one excepted."""
    needle = f"{MARK}={cluster}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if needle in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:  # gone, a zombie, or another user's
            continue
    return sorted(found)


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
