"""Control links inside one process, for tests and simulation. What passes is serialised, as on a wire, and
goes through a `defer` that may delay, hold or lose it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

from ..proto.errors import DeadlineExceeded, DiphaseError, PeerLost
from ..proto.handoff_pb2 import HandoffMessage, PeerHello
from .link import LinkAcceptor, LinkCaller, LinkUser

Defer = Callable[[str, str, Callable[[], None]], None]
"""(from address, to address, action): runs the action later, or never; actions of one direction in order."""


def soon(source: str, destination: str, action: Callable[[], None]) -> None:
    """On the next turn of the running loop."""
    asyncio.get_running_loop().call_soon(action)


class LinkNetwork:
    """Who listens where, and every link that is open."""

    def __init__(self, defer: Defer = soon) -> None:
        self.defer = defer
        self._listeners: dict[str, LinkAcceptor] = {}
        self._links: list[_End] = []

    def listen(self, address: str, acceptor: LinkAcceptor) -> None:
        self._listeners[address] = acceptor

    def cut(self, address: str, other: str | None = None) -> None:
        """Breaks the links of an address (with one other): both ends are told."""
        for end in list(self._links):
            if address in (end.here, end.there) and other in (None, end.here, end.there):
                self.defer(end.there, end.here, partial(end.lose, PeerLost("the link was cut")))

    def kill(self, address: str) -> None:
        """The process at an address is gone: nobody listens there and its links are cut."""
        self._listeners.pop(address, None)
        self.cut(address)

    def listener(self, address: str) -> LinkAcceptor | None:
        return self._listeners.get(address)

    def opened(self, end: _End) -> None:
        self._links.append(end)

    def closed(self, end: _End) -> None:
        if end in self._links:
            self._links.remove(end)


class _End:
    """One end of a link."""

    def __init__(self, network: LinkNetwork, here: str, there: str, user: LinkUser) -> None:
        self.here, self.there = here, there
        self.other: _End | None = None
        self.is_up = False
        self._network = network
        self._user = user
        self._early: list[HandoffMessage] = []
        self._closed = False
        network.opened(self)

    def send(self, message: HandoffMessage) -> None:
        if self._closed:
            return
        if not self.is_up or self.other is None:
            self._early.append(message)
            return
        self._network.defer(self.here, self.there, partial(self.other.deliver, message.SerializeToString()))

    def deliver(self, data: bytes) -> None:
        if not self._closed:
            self._user.link_messages(self, [HandoffMessage.FromString(data)])

    def raise_up(self) -> None:
        self.is_up = True
        early, self._early = self._early, []
        for message in early:
            self.send(message)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._network.closed(self)
        if self.other is not None:
            lose = partial(self.other.lose, PeerLost("the other end closed the link"))
            self._network.defer(self.here, self.there, lose)

    def lose(self, error: DiphaseError) -> None:
        if self._closed:
            return
        self._closed = True
        self._network.closed(self)
        self._user.link_down(self, error)


class MemoryDialer:
    """See link.Dialer. `address` is that of the process that dials."""

    def __init__(self, network: LinkNetwork, address: str) -> None:
        self._network = network
        self._address = address
        self._ends: list[_End] = []

    def dial(self, address: str, hello: PeerHello, caller: LinkCaller, timeout_s: float) -> _End:
        end = _End(self._network, self._address, address, caller)
        self._ends.append(end)
        expire = partial(self._expire, end, timeout_s)
        asyncio.get_running_loop().call_later(timeout_s, expire)
        ring = partial(self._ring, end, hello.SerializeToString(), caller)
        self._network.defer(self._address, address, ring)
        return end

    async def close(self) -> None:
        for end in self._ends:
            end.close()
        self._ends.clear()

    def _expire(self, end: _End, timeout_s: float) -> None:
        if not end.is_up:
            end.lose(DeadlineExceeded(f"{end.there} did not answer within {timeout_s:g} s"))

    def _ring(self, end: _End, hello: bytes, caller: LinkCaller) -> None:
        acceptor = self._network.listener(end.there)
        back = partial(self._network.defer, end.there, end.here)
        if acceptor is None:
            back(partial(end.lose, PeerLost(f"nobody listens at {end.there}")))
            return
        far = _End(self._network, end.there, end.here, acceptor)
        far.other = end
        far.is_up = True
        try:
            answer = acceptor.accept(far, PeerHello.FromString(hello))
        except DiphaseError as error:
            far.other = None
            far.close()
            back(partial(end.lose, error))
            return
        back(partial(self._answered, end, far, answer, caller))

    def _answered(self, end: _End, far: _End, answer: PeerHello, caller: LinkCaller) -> None:
        end.other = far
        if end not in self._ends:
            return
        try:
            caller.link_up(end, answer)
        except DiphaseError as error:
            end.close()
            caller.link_down(end, error)
            return
        end.raise_up()
