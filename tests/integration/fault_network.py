"""The network of the fault tests: one prefill and one decode worker in namespaces of their own, the others in
this process's. Control and KV of that pair go over a link each, to the others they have a third:

    prefill-0 ══ control ══ decode-0        10.x.y.32: decode-0's gRPC service, over "control" from prefill-0
        ║ ╚══════ kv ═══════╝ ║             10.x.y.33: decode-0's KV, over "kv" from prefill-0
        ╚════════ here ═══════╝             gateway, prefill-1, decode-1
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from ..network_namespaces import device, join, namespaces, shape, subnet
from .fault_workers import Site

FAST = "4gbit"


class FaultNetwork:
    """Made by `fault_network`."""

    def __init__(self, prefill: str, decode: str) -> None:
        here, self._name = subnet(), str(os.getpid())
        self.here = Site(None, f"{here}.1", f"{here}.1")
        self.prefill = Site(prefill, f"{here}.2", f"{here}.2")
        self.decode = Site(decode, f"{here}.32", f"{here}.33")
        self._join(None, prefill, "p", 0)
        self._join(None, decode, "d", 4)
        self._join(prefill, decode, "control", 8)
        self._join(prefill, decode, "kv", 12)
        for host, link, hop in ((self.decode.host, "control", 10), (self.decode.kv_host, "kv", 14)):
            device("addr", "add", f"{host}/32", "dev", "lo", of=decode)
            device("route", "add", f"{host}/32", "via", f"{here}.6", of=None)
            device("route", "add", f"{host}/32", "via", f"{here}.{hop}", "dev", f"{link}-0", of=prefill)
        self.kv_rate(FAST)

    def _join(self, first: str | None, second: str, link: str, base: int) -> None:
        """Links to this namespace have the process's id in their name: others make such links too."""
        link = link if first else f"{link}{self._name}"
        join(first, second, link, (f"{subnet()}.{base + 1}/30", f"{subnet()}.{base + 2}/30"))

    def set(self, link: str, *, up: bool) -> None:
        """`link`: "control" or "kv". It is the decode end that goes down: routes over the other stay."""
        device("link", "set", f"{link}-1", "up" if up else "down", of=self.decode.namespace)

    def kv_rate(self, rate: str) -> None:
        """Of the KV from prefill-0 to decode-0."""
        shape(str(self.prefill.namespace), "kv-0", rate)

    def restore(self) -> None:
        for link in ("control", "kv"):
            self.set(link, up=True)
        self.kv_rate(FAST)


@contextmanager
def fault_network() -> Iterator[FaultNetwork]:
    """
    Raises:
        Refused: namespaces may not be made here.
    """
    with namespaces("prefill", "decode") as (prefill, decode):
        yield FaultNetwork(prefill, decode)
