"""Two prefill and two decode worker processes behind the router's own dispatcher, for tests that hurt them.

The first attempt at a request goes through the pair that a test names, later ones where placement wants."""

from __future__ import annotations

import asyncio
import itertools
import random
import re
import urllib.request
from collections.abc import AsyncIterator, Collection, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diphase.proto import worker_pb2 as pb
from diphase.proto.clock import MonotonicClock
from diphase.proto.errors import DiphaseError
from diphase.proto.ids import PROTOCOL_VERSION
from diphase.proto.sampling import SamplingParams, sampling_to_proto
from diphase.proto.slo import Slo
from diphase.router.active_request import RequestStream
from diphase.router.config import RouterConfig
from diphase.router.dispatcher import Dispatcher
from diphase.router.goodput_policy import GoodputPolicy
from diphase.router.links import GrpcLink
from diphase.router.metrics import GatewayMetrics
from diphase.router.placement import Demand, Placement
from diphase.router.prefix_index import PrefixIndex
from diphase.router.text import PreparedRequest
from diphase.router.worker_handle import WorkerHandle, WorkerState
from diphase.router.workers import WorkerPool

from ..router.fakes import Members, MemoryJournal, until
from .fault_network import FaultNetwork
from .fault_workers import TOKEN, Site, Worker, WorkerProcesses, worker_processes

HEARTBEAT_S = 0.05
HANG_AFTER_S = 1.0
TRANSFER = {
    "reserve_timeout_s": 1.0,
    "lease_s": 3.0,
    "progress_timeout_s": 1.0,
    "tail_timeout_s": 3.0,
    "recompute": False,
    "max_waiting": 2,
}
LONGEST_S = 3.0
"""The longest deadline of TRANSFER."""
NO_WORKER_S = 2.0
"""How long a request waits for a worker to come back."""
WINDOW_BYTES = 16 << 20
"""Of a staging window, the default."""
VOCAB = 512

P0, P1, D0, D1 = "prefill-0", "prefill-1", "decode-0", "decode-1"
PAIR = (P0, D0)
"""Those that faults happen to."""


class SteeredPlacement(GoodputPolicy):
    """Placement among all workers, or among those that are named."""

    among: Collection[str] = ()

    def place(
        self, demand: Demand, workers: Sequence[WorkerHandle], avoid: Collection[str] = ()
    ) -> Placement | None:
        named = [worker for worker in workers if worker.worker_id in self.among]
        return super().place(demand, named if self.among else workers, avoid)


@dataclass(eq=False)
class Client:
    """One request as its client sees it."""

    prompt: list[int]
    max_tokens: int
    stream: RequestStream
    token_ids: list[int] = field(default_factory=list)
    arrivals: list[float] = field(default_factory=list)
    """When each token came."""
    error: DiphaseError | None = None
    task: asyncio.Task[None] | None = None

    @property
    def request_id(self) -> str:
        return self.stream.active.request_id

    @property
    def done(self) -> bool:
        return self.task is not None and self.task.done()

    @property
    def cancelled(self) -> bool:
        return self.task is not None and self.task.cancelled()

    @property
    def attempts(self) -> int:
        return self.stream.active.attempt + 1


class FaultCluster:
    """Made by `fault_cluster`."""

    def __init__(
        self,
        workers: Iterable[Worker],
        processes: WorkerProcesses,
        network: FaultNetwork | None,
        hang_after_s: float,
    ) -> None:
        self.workers = {worker.worker_id: worker for worker in workers}
        self.processes = processes
        self.network = network
        self._rng = random.Random(3)
        self._numbers = itertools.count()
        self._members = Members([])
        self._clients: list[Client] = []
        self.struck: set[str] = set()
        """Workers that a fault has, until heal()."""
        prefixes, clock, self._clock = PrefixIndex(100_000), MonotonicClock(), MonotonicClock()
        self.pool = WorkerPool(
            hello=pb.GatewayHello(
                gateway_id="g", incarnation="g-1", cluster_token=TOKEN, protocol_version=PROTOCOL_VERSION
            ),
            model="dummy:tiny",
            membership=self._members,
            link_factory=GrpcLink,
            prefixes=prefixes,
            clock=clock,
            hang_after_s=hang_after_s,
        )
        config = RouterConfig(
            wait_for_workers_s=NO_WORKER_S, local_prefill_tokens=0, expected_output_tokens=64
        )
        self._policy = SteeredPlacement(prefixes, config)
        self.dispatcher = Dispatcher(
            gateway_id="g",
            config=config,
            max_open_requests=1000,
            pool=self.pool,
            policy=self._policy,
            journal=MemoryJournal(),
            metrics=GatewayMetrics(),
            clock=clock,
        )

    # requests

    def prompt(self, num_tokens: int) -> list[int]:
        """One that nobody has cached."""
        return [self._rng.randrange(VOCAB) for _ in range(num_tokens)]

    def submit(self, num_tokens: int, max_tokens: int, via: tuple[str, str] | None = PAIR) -> Client:
        """A request of a new prompt; its first attempt goes through this pair.

        Raises:
            DiphaseError: it is refused.
        """
        now, number = self._clock.now(), next(self._numbers)
        request = PreparedRequest(
            request_id=f"r{number}",
            client_request_id=f"c{number}",
            prompt_token_ids=self.prompt(num_tokens),
            sampling=sampling_to_proto(SamplingParams(max_tokens=max_tokens, ignore_eos=True)),
            slo=Slo(ttft_ms=60_000.0, tpot_ms=60_000.0),
            received_at=now,
            tokenised_at=now,
        )
        self._policy.among = via or ()
        try:
            client = Client(request.prompt_token_ids, max_tokens, self.dispatcher.accept(request))
        finally:
            self._policy.among = ()
        client.task = asyncio.create_task(self._read(client))
        self._clients.append(client)
        return client

    async def _read(self, client: Client) -> None:
        active = client.stream.active
        try:
            while not active.delivered:
                tokens = await client.stream.next()
                now = self._clock.now()
                active.times.written(len(tokens.token_ids), now)
                assert tokens.first == len(client.token_ids)
                client.token_ids += tokens.token_ids
                client.arrivals += [now] * len(tokens.token_ids)
                active.delivered = bool(tokens.finish_reason)
        except DiphaseError as error:
            client.error = error
        finally:
            self.dispatcher.close(client.stream)

    async def cancel(self, client: Client) -> None:
        """The client goes away."""
        assert client.task is not None
        client.task.cancel()
        await asyncio.wait((client.task,))

    async def ended(self, client: Client) -> Client:
        """Finished, failed or cancelled."""
        assert client.task is not None
        await asyncio.wait((client.task,))
        if not client.task.cancelled():
            client.task.result()
        return client

    # what the workers say

    def handle(self, worker_id: str) -> WorkerHandle:
        handle = self.pool.get(worker_id)
        assert handle is not None
        return handle

    async def states(self, worker_id: str, client: Client, attempt: int = 0) -> list[tuple[str, float]]:
        """That the hand-off of this attempt was in, as the worker says, and since when; the newest last."""
        answers = await self.pool.inspector.ask([self.handle(worker_id)], client.request_id)
        if worker_id not in answers:
            return []
        track = f"hand-off, attempt {attempt}: state"
        return [(event.name, event.begin_s) for event in answers[worker_id].events if event.track == track]

    async def in_state(self, worker_id: str, client: Client, wanted: str) -> None:
        async def reached() -> bool:
            states = [name for name, _ in await self.states(worker_id, client)]
            assert "over" not in states, f"{wanted} was missed at {worker_id}: {states} {client.error}"
            return states[-1:] == [wanted]

        await until(reached)

    async def ready(self, *worker_ids: str, state: WorkerState = WorkerState.READY) -> None:
        """As the gateway calls them."""
        for worker_id in worker_ids or self.workers:
            await until(
                lambda worker_id=worker_id: (  # type: ignore[misc]
                    (handle := self.pool.get(worker_id)) is not None
                    and handle.state is state
                    and handle.incarnation == self.workers[worker_id].incarnation
                )
            )

    async def idle(self, *worker_ids: str) -> None:
        """Returns when nothing is used, reserved, held, quarantined, staged or in flight on these workers; by
        default on all that serve. Pieces of a stopped worker's staging window are its own to give back."""
        await asyncio.gather(*map(self._idle, worker_ids or filter(self.serves, self.workers)))

    async def _idle(self, worker_id: str) -> None:
        for _ in range(2):  # the first report may be on its way since before we asked
            await self.reported(worker_id)
        await until(lambda: _is_idle(self.handle(worker_id).load))
        await until(lambda: self._nothing_staged(worker_id))

    async def reported(self, worker_id: str) -> None:
        """Returns when it has said anew what load it has."""
        known = self.handle(worker_id).load
        await until(lambda: self.handle(worker_id).load is not known)

    async def _nothing_staged(self, worker_id: str) -> bool:
        text = await asyncio.to_thread(_read_metrics, self.workers[worker_id].metrics)
        used = dict(re.findall(r'^diphase_kv_staging_bytes{use="(\w+)"} (\S+)$', text, re.MULTILINE))
        # A window is lent for as long as its peer lives.
        prefills = sum(worker.role == "prefill" and worker.pid > 0 for worker in self.workers.values())
        lent = float(used.pop("lent", 0.0))
        if any(worker.stopped for worker in self.workers.values()):
            used.pop("at_peers", None)
        return lent <= prefills * WINDOW_BYTES and not any(map(float, used.values()))

    # faults

    def serves(self, worker_id: str) -> bool:
        worker = self.workers[worker_id]
        return worker.pid > 0 and not worker.stopped

    async def strike(self, worker_id: str, fault: str) -> None:
        """fault: kill; stop, until heal(); or restart: kill, and another comes at once under its address."""
        if fault == "stop":
            self.processes.stop(self.workers[worker_id])
        else:
            self.processes.kill(self.workers[worker_id])
        if fault == "restart":
            await self.restart(worker_id)
        else:
            self.struck.add(worker_id)

    def stop(self, worker_id: str) -> None:
        """A means to hold something, until resume()."""
        self.processes.stop(self.workers[worker_id])

    def resume(self, worker_id: str) -> None:
        """Unless the worker was struck meanwhile."""
        if worker_id not in self.struck:
            self.processes.resume(self.workers[worker_id])

    async def heal(self, worker_id: str) -> None:
        self.struck.discard(worker_id)
        if self.workers[worker_id].pid:
            self.processes.resume(self.workers[worker_id])
        else:
            await self.restart(worker_id)
        await self.ready(worker_id)

    async def restart(self, worker_id: str) -> None:
        """Another process under the same name and address."""
        await self.processes.start(self.workers[worker_id])
        self.announce()

    def announce(self) -> None:
        self._members.set([worker.member for worker in self.workers.values() if worker.address])

    async def mend(self) -> None:
        """Whatever a test has left: everybody runs, nothing runs on them, every link is as it was."""
        hurt = False
        for client in self._clients:
            hurt = hurt or not client.done
            await self.cancel(client)
        self._clients.clear()
        if self.network is not None:
            self.network.restore()
        for worker in self.workers.values():
            if not self.processes.alive(worker):
                worker.pid = 0
            if worker.stopped or not worker.pid:
                hurt = True
                await self.heal(worker.worker_id)
        if hurt:
            await self.idle()


def _is_idle(load: pb.Load) -> bool:
    busy = (load.handoffs, load.waiting_requests, load.running, load.blocks_quarantined)
    return (
        load.blocks_total > 0 and load.blocks_free + load.blocks_cached == load.blocks_total and not any(busy)
    )


def _read_metrics(address: str) -> str:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=5.0) as response:
        return str(response.read(), "utf-8")


@asynccontextmanager
async def fault_cluster(
    log: Path,
    network: FaultNetwork | None,
    *,
    heartbeat_s: float = HEARTBEAT_S,
    hang_after_s: float = HANG_AFTER_S,
    **transfer: Any,
) -> AsyncIterator[FaultCluster]:
    """`transfer`: of every worker's KvTransferConfig, beside TRANSFER. With a network the pair that faults
    happen to is apart from the others."""
    here = network.here if network else Site()
    prefill, decode = (network.prefill, network.decode) if network else (here, here)
    workers = (
        Worker(worker_id=P0, role="prefill", site=prefill, scheduler={"chunk_budget": 16}),
        Worker(worker_id=P1, role="prefill", site=here),
        Worker(worker_id=D0, role="decode", site=decode, kv_cache_mib=8),
        Worker(worker_id=D1, role="decode", site=here),
    )
    async with worker_processes(log, heartbeat_s, **{**TRANSFER, **transfer}) as processes:
        cluster = FaultCluster(workers, processes, network, hang_after_s)
        await asyncio.gather(*map(processes.start, workers))
        cluster.announce()
        attached = asyncio.create_task(cluster.pool.run())
        try:
            await cluster.ready()
            yield cluster
        finally:
            attached.cancel()
            await asyncio.wait((attached,))
