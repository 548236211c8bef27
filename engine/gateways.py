"""The gateways that have a stream to this worker, and since when those that had one have none."""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import Iterator

from ..proto.clock import Clock
from ..proto.errors import Cancelled, ConfigError, DiphaseError, InvalidRequest, Unauthenticated
from ..proto.ids import PROTOCOL_VERSION
from ..proto.worker_pb2 import GatewayHello, WorkerMessage
from .gateway_link import GatewayLink

logger = logging.getLogger(__name__)


def check_hello(hello: GatewayHello, cluster_token: str) -> None:
    """Whether a gateway may attach.

    Raises:
        Unauthenticated: the cluster token is wrong.
        ConfigError: the gateway speaks another protocol version.
        InvalidRequest: it does not say who it is.
    """
    if not hmac.compare_digest(hello.cluster_token.encode(), cluster_token.encode()):
        raise Unauthenticated("the cluster token is missing or wrong; give every process the same one")
    if hello.protocol_version != PROTOCOL_VERSION:
        raise ConfigError(
            f"the gateway speaks protocol {hello.protocol_version}, this worker {PROTOCOL_VERSION}; "
            "run one version of diphase"
        )
    if not hello.gateway_id:
        raise InvalidRequest("the hello has no gateway_id")


class Gateways:
    """Links by gateway_id, at most one each."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._links: dict[str, GatewayLink] = {}
        self._gone_since: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._links)

    def __iter__(self) -> Iterator[GatewayLink]:
        # A copy: sending to a gateway that does not read closes its link.
        return iter(list(self._links.values()))

    def get(self, gateway_id: str) -> GatewayLink | None:
        return self._links.get(gateway_id)

    def add(self, link: GatewayLink) -> None:
        """Replaces an older link of the same gateway."""
        if old := self._links.get(link.gateway_id):
            old.close(Cancelled("the gateway opened a newer stream"))
        self._links[link.gateway_id] = link
        self._gone_since.pop(link.gateway_id, None)
        logger.info("gateway_attached gateway_id=%s", link.gateway_id)

    def closed(self, link: GatewayLink) -> None:
        """A link ended, from either side."""
        if self._links.get(link.gateway_id) is link:
            del self._links[link.gateway_id]
            self.expect(link.gateway_id)
            logger.info("gateway_detached gateway_id=%s reason=%s", link.gateway_id, link.error or "closed")

    def expect(self, gateway_id: str) -> None:
        """A request's tokens go to this gateway: from now on it counts as gone while it has no link."""
        if gateway_id not in self._links:
            self._gone_since.setdefault(gateway_id, self._clock.now())

    def take_lost(self, orphan_s: float) -> list[str]:
        """Those that have been gone for so long, once."""
        before = self._clock.now() - orphan_s
        lost = [gateway_id for gateway_id, since in self._gone_since.items() if since <= before]
        for gateway_id in lost:
            del self._gone_since[gateway_id]
        return lost

    def send(self, gateway_id: str, message: WorkerMessage) -> None:
        """To one, if it has a link; what it misses it can ask for later."""
        if link := self._links.get(gateway_id):
            link.send(message)

    def send_all(self, message: WorkerMessage) -> None:
        for link in self:
            link.send(message)

    async def wait_empty(self, timeout_s: float) -> None:
        """Returns when all have taken what was queued, or after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                for link in self:
                    await link.wait_empty()
        except TimeoutError:
            logger.warning("gateways_do_not_read timeout_s=%g", timeout_s)

    def close(self, error: DiphaseError) -> None:
        for link in self:
            link.close(error)
