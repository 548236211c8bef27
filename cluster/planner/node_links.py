"""Which nodes and racks the workers of a placement are in, and the links that a hand-off between two takes.

Workers fill one node after the other, prefill and decode ones in the proportion of their pools, so that as
many pairs as possible share a node; types of GPUs share none. Within a node a hand-off goes over the workers'
own links (NVLink), between nodes over their ports and whatever their nodes and racks share.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from .hardware import Node
from .topology import Topology

GIGA = 1e9


class Seat(NamedTuple):
    """A worker, as far as links ask."""

    role: str
    hardware: Node
    gpus: int


class Site(NamedTuple):
    """Where a worker is: numbers among the nodes and racks of its hardware."""

    hardware: Node
    nodes: tuple[int, ...]
    rack: int


def links_of(seats: Sequence[Seat], parts: int = 1) -> Topology:
    """The topology of all prefill and decode workers among the seats, by their places.

    Args:
        parts: how many times the seats are there. Of several that do not share a node only one is simulated,
            though the router also pairs workers of different ones: its hand-offs all leave their nodes, and
            each worker has the share of its GPUs in what nodes and racks share.
    """
    pairs = [
        (source, target)
        for source, sender in enumerate(seats)
        for target, receiver in enumerate(seats)
        if (sender.role, receiver.role) == ("prefill", "decode")
    ]
    if not pairs:
        return Topology(bandwidths=(), paths={})
    if parts == 1 or _fit_a_node(seats, parts):
        links = _Links(seats, sites_of(seats))
        paths = {pair: links.path(*pair) for pair in pairs}
        bandwidths = links.bandwidths
    else:
        bandwidths = [_alone(seat, seats, parts) for seat in seats]
        paths = {pair: pair for pair in pairs}
    return Topology(bandwidths=tuple(bandwidths), paths=paths, latency_s=seats[0].hardware.handoff_s)


def sites_of(seats: Sequence[Seat]) -> list[Site]:
    """Where each worker is: in the first node that has room, if it fits one; else in nodes that it begins."""
    roles = [seat.role for seat in seats]
    shares = [(roles[:i].count(role) + 0.5) / roles.count(role) for i, role in enumerate(roles)]
    free: dict[Node, list[int]] = {}
    sites: dict[int, Site] = {}
    for i in sorted(range(len(seats)), key=lambda i: (shares[i], i)):
        hardware, gpus = seats[i].hardware, seats[i].gpus
        nodes = free.setdefault(hardware, [])
        first = next((n for n, room in enumerate(nodes) if room >= gpus), len(nodes))
        taken: list[int] = []
        while gpus > 0:
            node = first + len(taken)
            if node == len(nodes):
                nodes.append(hardware.gpus_per_node)
            here = min(gpus, nodes[node])
            nodes[node] -= here
            gpus -= here
            taken.append(node)
        rack = first // hardware.nodes_per_rack if hardware.nodes_per_rack else 0
        sites[i] = Site(hardware, tuple(taken), rack)
    return [sites[i] for i in range(len(seats))]


class _Links:
    """Of workers at known sites; made when the first path takes them."""

    def __init__(self, seats: Sequence[Seat], sites: Sequence[Site]) -> None:
        self.bandwidths: list[float] = []
        self._seats = seats
        self._sites = sites
        self._numbers: dict[tuple[object, ...], int] = {}

    def path(self, source: int, target: int) -> tuple[int, ...]:
        """Link numbers."""
        here, there = self._sites[source], self._sites[target]
        if (here.hardware, here.nodes) == (there.hardware, there.nodes) and len(here.nodes) == 1:
            return tuple(self._inside(worker) for worker in (source, target))
        leaves = (here.hardware, here.rack) != (there.hardware, there.rack)
        return (
            self._port(source),
            *self._shared("out", here, leaves),
            *self._shared("in", there, leaves),
            self._port(target),
        )

    def _shared(self, direction: str, site: Site, leaves_rack: bool) -> Iterator[int]:
        """What a worker's node shares, and its rack. A worker of several nodes has a node's way out in each,
        which its own port stands for."""
        hardware = site.hardware
        if hardware.node_gb_per_s and len(site.nodes) == 1:
            yield self._link((direction, hardware, "node", *site.nodes), hardware.node_gb_per_s, hardware)
        if hardware.rack_gb_per_s and leaves_rack:
            yield self._link((direction, hardware, "rack", site.rack), hardware.rack_gb_per_s, hardware)

    def _inside(self, worker: int) -> int:
        _, hardware, gpus = self._seats[worker]
        return self._link((worker, "inside"), hardware.intra_node_gb_per_s * gpus, hardware)

    def _port(self, worker: int) -> int:
        _, hardware, gpus = self._seats[worker]
        width = hardware.inter_node_gb_per_s * gpus
        if hardware.node_gb_per_s:
            width = min(width, hardware.node_gb_per_s * len(self._sites[worker].nodes))
        return self._link((worker, "port"), width, hardware)

    def _link(self, key: tuple[object, ...], gb_per_s: float, hardware: Node) -> int:
        if key not in self._numbers:
            self._numbers[key] = len(self.bandwidths)
            self.bandwidths.append(gb_per_s * GIGA * hardware.link_share)
        return self._numbers[key]


def _fit_a_node(seats: Sequence[Seat], parts: int) -> bool:
    hardware = seats[0].hardware
    one_type = all(seat.hardware == hardware for seat in seats)
    return one_type and sum(seat.gpus for seat in seats) * parts <= hardware.gpus_per_node


def _alone(seat: Seat, seats: Sequence[Seat], parts: int) -> float:
    """Bytes a second of a worker's way out of its node, and out of its rack where its type needs several."""
    hardware = seat.hardware
    per_gpu = [hardware.inter_node_gb_per_s]
    if hardware.node_gb_per_s:
        per_gpu.append(hardware.node_gb_per_s / hardware.gpus_per_node)
    if hardware.rack_gb_per_s and hardware.nodes_per_rack:
        in_a_rack = hardware.nodes_per_rack * hardware.gpus_per_node
        if sum(other.gpus for other in seats if other.hardware == hardware) * parts > in_a_rack:
            per_gpu.append(hardware.rack_gb_per_s / in_a_rack)
    return min(per_gpu) * seat.gpus * GIGA * hardware.link_share
