"""Links between simulated workers, and the transfers that share them.

Every link has a bandwidth that the transfers on it share equally; a transfer goes at the smallest of its
links' shares. (Max-min fairness would give what a slow transfer leaves of a share to the others; with the few
transfers that a cluster has under way the two rarely differ.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ...proto.errors import ConfigError
from .events import LAST, NS, EventQueue


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """Which links a hand-off from one worker to another takes; workers are named by their index."""

    bandwidths: tuple[float, ...]
    """Bytes a second of each link; infinite: the link takes no time."""
    paths: dict[tuple[int, int], tuple[int, ...]]
    """Links by (from, to); pairs that are not here cannot hand over."""
    latency_s: float = 0.0
    """What a hand-off takes beside its bytes: reservation, notices, verification."""

    def __post_init__(self) -> None:
        for i, bandwidth in enumerate(self.bandwidths):
            if not bandwidth > 0.0:
                raise ConfigError(f"topology: link {i} has {bandwidth} bytes/s; use more than 0")
        if not 0.0 <= self.latency_s < 3600.0:
            raise ConfigError(f"topology: latency_s = {self.latency_s} is out of range; use 0 to 3600")
        for (source, target), path in self.paths.items():
            if any(not 0 <= link < len(self.bandwidths) for link in path):
                raise ConfigError(
                    f"topology: the path {source} to {target} names links {path} of {len(self.bandwidths)}"
                )


def free_topology(sources: Sequence[int], targets: Sequence[int]) -> Topology:
    """Hand-offs take no time, as in DistServe's simulator."""
    return Topology(bandwidths=(), paths={(s, t): () for s in sources for t in targets})


def flat_topology(
    sources: Sequence[int], targets: Sequence[int], bandwidth: float, latency_s: float = 0.0
) -> Topology:
    """One link out of every source, one into every target, and nothing between. Who is both has one."""
    links = {worker: i for i, worker in enumerate(dict.fromkeys((*sources, *targets)))}
    return Topology(
        bandwidths=(bandwidth,) * len(links),
        paths={(s, t): (links[s], links[t]) for s in sources for t in targets},
        latency_s=latency_s,
    )


_OVER = -1
"""Version of a transfer that has ended."""


@dataclass(slots=True, eq=False)
class Transfer:
    """Bytes on their way."""

    path: tuple[int, ...]
    done: Callable[[], None]
    left: float
    """Bytes at `since`."""
    since: int
    rate: float = 0.0
    """Bytes a nanosecond."""
    version: int = field(default=0)
    """Of its rate: an end that was announced for an older one is void."""


class Links:
    """Transfers under way."""

    def __init__(self, topology: Topology, events: EventQueue) -> None:
        self._bandwidths = [bandwidth / NS for bandwidth in topology.bandwidths]
        self._events = events
        self._on: list[dict[Transfer, None]] = [{} for _ in self._bandwidths]

    def send(self, path: tuple[int, ...], num_bytes: float, done: Callable[[], None]) -> Transfer:
        """Calls `done` when so many bytes have gone over all links of the path."""
        transfer = Transfer(path, done, float(num_bytes), self._events.now)
        for link in path:
            self._on[link][transfer] = None
        self._share(path)
        if not path:
            self._events.at(self._events.now, self._end, transfer, transfer.version)
        return transfer

    def cancel(self, transfer: Transfer) -> None:
        """Its bytes go no further, and `done` is not called any more. Idempotent."""
        transfer.version = _OVER
        for link in transfer.path:
            self._on[link].pop(transfer, None)
        self._share(transfer.path)

    def _share(self, path: tuple[int, ...]) -> None:
        """New rates for all that have a link in common with the path."""
        touched = dict.fromkeys(transfer for link in path for transfer in self._on[link])
        now = self._events.now
        for transfer in touched:
            rate = min(self._bandwidths[link] / len(self._on[link]) for link in transfer.path)
            if rate == transfer.rate:
                continue
            if transfer.rate:
                transfer.left = max(0.0, transfer.left - transfer.rate * (now - transfer.since))
            transfer.since, transfer.rate = now, rate
            transfer.version += 1
            takes = 0 if math.isinf(rate) else math.ceil(min(transfer.left / rate, LAST))
            self._events.at(now + takes, self._end, transfer, transfer.version)

    def _end(self, transfer: Transfer, version: int) -> None:
        if version != transfer.version:
            return
        self.cancel(transfer)
        transfer.done()
