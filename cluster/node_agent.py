"""One small actor a node: it sees in milliseconds that a worker's process ended, and ends one that hangs.

Ray tells callers of a restartable actor only after one to two seconds that its process died, and never that
it is stopped.
"""

from __future__ import annotations

from . import processes


class NodeAgent:
    """Runs as an asyncio actor without resources on the node of the workers it serves."""

    def __init__(self, mark: str) -> None:
        self._mark = processes.bear(mark)

    async def wait_exit(self, pid: int, ticks: int) -> None:
        """Returns once that process (see processes.started_at) has ended."""
        await processes.wait_exit(pid, ticks)

    async def kill(self, pid: int, ticks: int) -> bool:
        """SIGKILL, which a stopped process cannot ignore; False when it had ended already."""
        return processes.kill(pid, ticks)
