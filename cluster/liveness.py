"""Who hangs: asked of the gateways, whose streams are the authority on it, and of the gateways themselves
by asking.

A process that is stopped or stuck looks alive to Ray. Gateways call a worker hung after silence on its
stream; when all gateways that answer agree for a while, the worker is killed. A gateway is killed as well
when it leaves two questions in a row unanswered: one slow answer is no hang.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Iterable, Mapping
from typing import Protocol

from ..proto import cluster_pb2 as pb
from ..proto.clock import Clock
from ..proto.errors import DiphaseError
from .config import SupervisorConfig
from .roles import Started
from .slot import Slot

logger = logging.getLogger(__name__)

EVERY_S = 0.2
HUNG = "hung"


class StatusSource(Protocol):
    """How a gateway is asked."""

    async def __call__(self, address: str, timeout_s: float) -> pb.GetStatusResponse:
        """One gateway's view of the cluster.

        Raises:
            TimeoutError: it took the question and was silent for `timeout_s`.
            DiphaseError: nobody is there.
        """
        ...


def hung_incarnations(views: Iterable[pb.GetStatusResponse]) -> set[str]:
    """Workers that at least one gateway calls hung and none calls anything else."""
    states: dict[str, set[str]] = {}
    for view in views:
        for worker in view.workers:
            states.setdefault(worker.incarnation, set()).add(worker.state)
    return {incarnation for incarnation, seen in states.items() if seen == {HUNG}}


class Persistence:
    """Since when something has been so without a break."""

    def __init__(self) -> None:
        self._since: dict[str, float] = {}

    def update(self, now: float, current: Iterable[str]) -> Mapping[str, float]:
        """Seconds that each of `current` has lasted; what is not current any more starts over."""
        self._since = {name: self._since.get(name, now) for name in current}
        return {name: now - since for name, since in self._since.items()}


class LivenessWatch:
    """Kills what hangs, so that it is started anew."""

    def __init__(
        self, slots: Collection[Slot], ask: StatusSource, clock: Clock, config: SupervisorConfig
    ) -> None:
        """`slots` may change: who is in it at a look is looked at."""
        self._slots = slots
        self._ask = ask
        self._clock = clock
        self._config = config
        self._hung = Persistence()
        self._silent: set[str] = set()
        """Incarnations of the gateways that left the last question unanswered."""

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(EVERY_S)

    async def look(self) -> None:
        """Asks every gateway once and kills what hangs."""
        running = [(slot, slot.started) for slot in self._slots if slot.started is not None]
        gateways = [started for _slot, started in running if started.role == "gateway"]
        answers = await asyncio.gather(*(self._view(started) for started in gateways))
        views = [answer for answer in answers if isinstance(answer, pb.GetStatusResponse)]
        silent = {answer for answer in answers if isinstance(answer, str)}
        doomed = silent & self._silent
        self._silent = silent
        lasting = self._hung.update(self._clock.now(), hung_incarnations(views))
        doomed |= {name for name, seconds in lasting.items() if seconds >= self._config.hang_grace_s}
        victims = [(slot, started) for slot, started in running if started.incarnation in doomed]
        for _slot, started in victims:
            logger.warning("process_hangs worker_id=%s pid=%d", started.worker_id, started.pid)
        await asyncio.gather(*(slot.process.kill(started) for slot, started in victims))

    async def _view(self, gateway: Started) -> pb.GetStatusResponse | str | None:
        """Its view; its incarnation when it is silent; None when nobody is there, as its slot notices."""
        try:
            return await self._ask(gateway.address, self._config.gateway_hang_s)
        except TimeoutError:
            return gateway.incarnation
        except DiphaseError:
            return None
