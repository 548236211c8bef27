"""Workers in nodes and racks, and what lies between two of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from diphase.cluster.planner.events import EventQueue
from diphase.cluster.planner.hardware import Node
from diphase.cluster.planner.node_links import Seat, links_of, sites_of
from diphase.cluster.planner.topology import Links, Topology
from diphase.proto.errors import ConfigError

NODE = Node(
    name="node", intra_node_gb_per_s=100.0, inter_node_gb_per_s=10.0, gpus_per_node=8, link_share=1.0,
    handoff_s=0.5,
)  # fmt: skip
RACKS = replace(NODE, nodes_per_rack=2, rack_gb_per_s=15.0)


def seats(prefills: int, decodes: int, gpus: int = 4, node: Node = NODE) -> list[Seat]:
    return [Seat("prefill", node, gpus)] * prefills + [Seat("decode", node, gpus)] * decodes


def nodes(workers: list[Seat]) -> list[tuple[int, ...]]:
    return [site.nodes for site in sites_of(workers)]


def takes_s(topology: Topology, pairs: list[tuple[int, int]], num_bytes: float = 1e9) -> list[float]:
    """Seconds of hand-offs that begin together."""
    events = EventQueue()
    links = Links(topology, events)
    ends = [0.0] * len(pairs)

    def send(i: int) -> None:
        def done() -> None:
            ends[i] = events.now / 1e9

        links.send(topology.paths[pairs[i]], num_bytes, done)

    for i in range(len(pairs)):
        send(i)
    events.run()
    return ends


def test_pairs_share_nodes_in_the_proportion_of_the_pools() -> None:
    assert nodes(seats(2, 2)) == [(0,), (1,), (0,), (1,)]
    # One of prefill for three of decode: the first node has both.
    assert nodes(seats(1, 3)) == [(0,), (0,), (1,), (1,)]
    assert nodes(seats(4, 4, gpus=1)) == [(0,)] * 8


def test_a_worker_larger_than_a_node_begins_nodes_and_what_it_leaves_is_used() -> None:
    workers = [Seat("prefill", NODE, 12), Seat("decode", NODE, 8), Seat("decode", NODE, 4)]
    assert nodes(workers) == [(1, 2), (0,), (2,)]
    assert takes_s(links_of(workers), [(0, 1)]) == pytest.approx([1 / 80]), "a decode worker's port"


def test_types_of_gpus_share_no_node() -> None:
    other = replace(NODE, name="other")
    found = sites_of([Seat("prefill", NODE, 1), Seat("decode", other, 1)])
    assert [(site.hardware.name, site.nodes) for site in found] == [("node", (0,)), ("other", (0,))]
    topology = links_of([Seat("prefill", NODE, 1), Seat("decode", other, 1)])
    assert takes_s(topology, [(0, 1)]) == pytest.approx([0.1])


def test_a_hand_off_within_a_node_goes_over_its_own_links_and_another_over_ports() -> None:
    topology = links_of(seats(2, 2))
    assert topology.latency_s == 0.5
    assert takes_s(topology, [(0, 2)]) == pytest.approx([1 / 400])
    assert takes_s(topology, [(0, 3)]) == pytest.approx([1 / 40])
    # They do not share a link; two into one worker do.
    assert takes_s(topology, [(0, 2), (0, 3)]) == pytest.approx([1 / 400, 1 / 40])
    assert takes_s(links_of(seats(3, 1)), [(0, 3), (1, 3)]) == pytest.approx([2 / 40, 2 / 40])


def test_workers_of_a_node_share_its_way_out() -> None:
    narrow = replace(NODE, node_gb_per_s=20.0)
    topology = links_of(seats(4, 4, gpus=4, node=narrow))
    assert [site.nodes for site in sites_of(seats(4, 4, gpus=4, node=narrow))][:2] == [(0,), (1,)]
    assert takes_s(topology, [(0, 5)]) == pytest.approx([1 / 20])
    # Out of one node twice, into two others: that one is what they share.
    wide = links_of(seats(4, 2, gpus=2, node=narrow))
    here = [site.nodes for site in sites_of(seats(4, 2, gpus=2, node=narrow))]
    assert here == [(0,), (0,), (0,), (1,), (0,), (1,)]
    assert takes_s(wide, [(0, 5), (1, 5)]) == pytest.approx([2 / 20, 2 / 20])


def test_racks_share_their_uplinks_and_nodes_of_one_rack_do_not_take_them() -> None:
    workers = seats(4, 4, node=RACKS)
    assert [site.rack for site in sites_of(workers)] == [0, 0, 1, 1] * 2
    topology = links_of(workers)
    assert takes_s(topology, [(0, 5)]) == pytest.approx([1 / 40]), "another node of the rack"
    assert takes_s(topology, [(0, 6)]) == pytest.approx([1 / 15])
    assert takes_s(topology, [(0, 6), (1, 7)]) == pytest.approx([2 / 15] * 2), "out of rack 0 both"
    assert takes_s(topology, [(0, 6), (2, 5)]) == pytest.approx([1 / 15] * 2), "one each way"


def test_a_part_of_a_larger_whole_leaves_its_node_with_its_share_of_what_is_shared() -> None:
    part = seats(1, 1)
    assert takes_s(links_of(part), [(0, 1)]) == pytest.approx([1 / 400])
    assert takes_s(links_of(part, parts=2), [(0, 1)]) == pytest.approx([1 / 40])
    assert takes_s(links_of(seats(1, 1, gpus=1), parts=4), [(0, 1)]) == pytest.approx([1 / 100]), "one node"
    narrow = replace(NODE, node_gb_per_s=20.0)
    assert takes_s(links_of(seats(1, 1, node=narrow), parts=2), [(0, 1)]) == pytest.approx([1 / 10])
    racks = seats(1, 1, node=RACKS)
    assert takes_s(links_of(racks, parts=2), [(0, 1)]) == pytest.approx([1 / 40]), "all in one rack"
    assert takes_s(links_of(racks, parts=3), [(0, 1)]) == pytest.approx([4 / 15])


def test_colocated_workers_take_room_and_no_links() -> None:
    assert links_of([Seat("colocated", NODE, 4)] * 3) == Topology(bandwidths=(), paths={})
    mixed = [Seat("colocated", NODE, 8), *seats(1, 1)]
    assert nodes(mixed) == [(0,), (1,), (1,)]
    assert takes_s(links_of(mixed), [(1, 2)]) == pytest.approx([1 / 400])


def test_half_a_rack_is_refused() -> None:
    with pytest.raises(ConfigError, match="give both or none"):
        replace(NODE, nodes_per_rack=2)
    with pytest.raises(ConfigError, match="give both or none"):
        replace(NODE, rack_gb_per_s=10.0)
    with pytest.raises(ConfigError, match=r"node_gb_per_s is 0\.0; it must be above 0"):
        replace(NODE, node_gb_per_s=0.0)
