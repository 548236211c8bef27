"""tcp between two network namespaces, each an own process, over a link that can be taken down."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ...network_namespaces import Refused, device, join, namespaces, shape

CHILD = "tests.conformance.transport_child"
ROOT = Path(__file__).resolve().parents[3]
MIB = 1024 * 1024
SIZE = 24 * MIB
needs_nixl = pytest.mark.skipif(
    importlib.util.find_spec("nixl_cu13") is None, reason="nixl-cu13 is not installed"
)
RATE = "400mbit"
"""A transfer of SIZE takes half a second: time to take the link down in the middle."""


@dataclass
class Net:
    """Two namespaces with a veth pair between them."""

    names: list[str]
    addresses: tuple[str, str] = ("10.231.7.1", "10.231.7.2")

    def link(self, state: str) -> None:
        device("link", "set", "kv-0", state, of=self.names[0])


@pytest.fixture(scope="module")
def net() -> Iterator[Net]:
    with ExitStack() as stack:
        try:
            names = stack.enter_context(namespaces("tcp0", "tcp1"))
        except Refused as refused:
            pytest.skip(str(refused))
        net = Net(names)
        join(names[0], names[1], "kv", (f"{net.addresses[0]}/24", f"{net.addresses[1]}/24"))
        for i, name in enumerate(names):
            shape(name, f"kv-{i}", RATE)
        yield net


class Child:
    """One end in its namespace."""

    def __init__(self, net: Net, i: int, transport: str) -> None:
        end = (transport, f"end{i}", str(SIZE), net.addresses[i])
        self.process = subprocess.Popen(
            [
                *f"ip netns exec {net.names[i]}".split(),
                sys.executable,
                "-P",
                "-m",
                "tests.conformance.transport_child",
                *end,
            ],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.said: list[dict[str, Any]] = []
        self.endpoint: str = self.until("endpoint")["endpoint"]

    def until(self, key: str) -> dict[str, Any]:
        """What it said first of this kind and was not asked for before."""
        assert self.process.stdout is not None
        while True:
            for line in self.said:
                if key in line:
                    self.said.remove(line)
                    return line
            self.said.append(json.loads(self.process.stdout.readline()))

    def tell(self, **command: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return self.until("ok")

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


OVER_TCP = ["tcp over 1 sockets", "tcp over 3 sockets"]


@pytest.fixture
def ends(net: Net, request: pytest.FixtureRequest) -> Iterator[tuple[Child, Child]]:
    children: list[Child] = []
    try:
        for i in (0, 1):
            children.append(Child(net, i, request.param))
        children[1].tell(admit="end0")
        children[0].tell(connect=children[1].endpoint)
        yield children[0], children[1]
    finally:
        net.link("up")
        for child in children:
            child.end()


@pytest.mark.parametrize("ends", [*OVER_TCP, pytest.param("nixl", marks=needs_nixl)], indirect=True)
def test_a_link_that_goes_down_and_comes_back_costs_time_and_nothing_else(
    net: Net, ends: tuple[Child, Child]
) -> None:
    a, b = ends
    a.tell(write="end1", fill=3, times=2)
    b.until("notified")
    net.link("down")  # the second transfer is on its way
    a.tell(write="end1", fill=3, times=1)
    a.tell(write="end1", fill=3, times=1, s=0.05)
    assert a.until("failed")["failed"] == "deadline_exceeded"
    net.link("up")
    for _ in range(2):
        b.until("notified")
    for _ in range(3):
        a.until("done")
    assert b.tell(sums=True)["ok"] == 3 * SIZE
    assert [line for line in a.said + b.said if "down" in line] == []


@pytest.mark.parametrize("ends", OVER_TCP, indirect=True)
def test_a_link_that_stays_down_fails_transfers_at_their_deadlines_and_the_fence_ends_the_peer(
    net: Net, ends: tuple[Child, Child]
) -> None:
    a, b = ends
    a.tell(write="end1", fill=3, times=1)
    b.until("notified")
    net.link("down")
    a.tell(write="end1", fill=3, times=3, s=0.3)
    for _ in range(3):
        assert a.until("failed")["failed"] == "deadline_exceeded"
    b.tell(fence="end0", s=0.2)  # who reads may close: then nothing comes any more
    assert b.until("fenced")["fenced"] is True
    assert b.until("down")["down"] == "end0"
