"""Finds a running request that another gateway accepted: asks the journal where it is, and the workers for
it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from ..proto import inference_pb2, worker_pb2
from ..proto.clock import Clock
from ..proto.errors import InvalidRequest, NotFound, WorkerLost, from_wire
from ..proto.sampling import sampling_from_proto
from ..proto.slo import Slo, slo_from_proto
from .active_request import ActiveRequest
from .journal import Journal, JournalUnavailable
from .text import PreparedRequest
from .worker_handle import WorkerHandle
from .workers import WorkerPool

logger = logging.getLogger(__name__)

ASK_AGAIN_S = 0.1


class _Search:
    """One request that is being looked for."""

    def __init__(self, workers: list[WorkerHandle]) -> None:
        self.silent = {worker.worker_id for worker in workers}
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def answered(self, worker: WorkerHandle) -> None:
        self.silent.discard(worker.worker_id)
        if not self.silent and not self.over.done():
            self.over.set_result(None)


class Reattacher:
    """Searches under way. A request that is found is in `active` from the moment of the first worker's
    answer, since its tokens follow on the same stream."""

    def __init__(
        self,
        *,
        pool: WorkerPool,
        journal: Journal,
        timeout_s: float,
        active: dict[str, ActiveRequest],
        adopt: Callable[[ActiveRequest], None],
        clock: Clock,
    ) -> None:
        self._pool = pool
        self._journal = journal
        self._timeout_s = timeout_s
        self._clock = clock
        self._active = active
        self._adopt = adopt
        self._searches: dict[str, _Search] = {}

    async def find(self, request_id: str) -> ActiveRequest:
        """Raises:
        NotFound: no such request runs.
        WorkerLost: it ran, and whoever had it is lost.
        InvalidRequest: another call is re-attaching to it right now.
        """
        workers = await self._candidates(request_id)
        if request_id in self._searches:
            raise InvalidRequest(f"another call is re-attaching to request {request_id!r}; keep that one")
        search = self._searches[request_id] = _Search(workers)
        try:
            for worker in workers:
                worker.send(_resume(request_id))
            if workers:
                async with asyncio.timeout(self._timeout_s):
                    await search.over
        except TimeoutError:
            logger.warning("resume_unanswered request_id=%s workers=%s", request_id, sorted(search.silent))
        finally:
            del self._searches[request_id]
        active = self._active.get(request_id)
        if active is None:
            raise WorkerLost(
                f"request {request_id!r} was lost with its gateway and its worker; send it again",
                retry_after_s=1.0,
            )
        return active

    def resumed(self, worker: WorkerHandle, message: worker_pb2.Resumed) -> None:
        """A worker's answer."""
        search = self._searches.get(message.request_id)
        active = self._active.get(message.request_id)
        if message.known and (search is not None or active is not None):
            if active is None:
                active = _rebuild(message.submit, self._clock.now())
                self._assign(active, worker, message.submit)
                self._adopt(active)
            if message.submit.attempt == active.attempt:
                self._merge(active, worker, message)
        elif active is not None and active.decode is worker and not active.decoding:
            self._ask_again(active, worker)
        if search is not None:
            search.answered(worker)

    def lost(self, worker: WorkerHandle) -> None:
        """It will not answer."""
        for search in self._searches.values():
            search.answered(worker)

    async def _candidates(self, request_id: str) -> list[WorkerHandle]:
        """The workers that the journal names; every one while the journal is away."""
        try:
            record = await self._journal.lookup(request_id)
        except JournalUnavailable as exc:
            logger.warning("resume_without_journal request_id=%s error=%s", request_id, exc)
            return [worker for worker in self._pool.handles() if worker.usable]
        if record is None:
            raise NotFound(f"no request {request_id!r} is known; start it without resume_from")
        if record.ended:
            raise NotFound(f"request {request_id!r} is over ({record.state}); start a new one")
        named = [self._pool.get(worker_id) for worker_id in (record.prefill, record.decode)]
        return [worker for worker in named if worker is not None and worker.usable]

    def _assign(self, active: ActiveRequest, worker: WorkerHandle, submit: worker_pb2.Submit) -> None:
        """Who has the request, as the worker that answered knows it."""
        if worker.role == "prefill":
            active.prefill = worker
            active.decode = self._pool.get(submit.decode.worker_id)
        else:
            active.decode = worker
        active.times.attempts = submit.attempt + 1
        active.times.decode_worker = active.decode.worker_id if active.decode is not None else ""
        active.times.prefill_worker = worker.worker_id

    def _merge(self, active: ActiveRequest, worker: WorkerHandle, message: worker_pb2.Resumed) -> None:
        if worker.role == "prefill":
            active.prefill = worker
            active.times.prefill_worker = worker.worker_id
            # A decode worker knows the request from its reservation on, which may still be to come.
            if active.decode is not None and not active.decoding:
                self._ask_again(active, active.decode)
        else:
            active.decode = worker
            active.decoding = True
        token_ids = list(message.token_ids)
        missing = len(token_ids) - len(message.logprobs) if message.logprobs else 0
        logprobs = [inference_pb2.TokenLogprobs()] * missing + list(message.logprobs)
        active.take(0, token_ids, logprobs)
        if not message.HasField("terminal"):
            return
        terminal = message.terminal
        if terminal.finish_reason:
            active.take_terminal(len(token_ids), terminal.finish_reason)
        elif worker is active.decode or active.needs_prefill:
            active.fail(from_wire(terminal.error.code or "worker_lost", terminal.error.message))

    def _ask_again(self, active: ActiveRequest, worker: WorkerHandle) -> None:
        asyncio.get_running_loop().call_later(ASK_AGAIN_S, self._ask, active, worker, active.attempt)

    def _ask(self, active: ActiveRequest, worker: WorkerHandle, attempt: int) -> None:
        current = self._active.get(active.request_id) is active and active.attempt == attempt
        if current and not active.decoding and not active.ended:
            worker.send(_resume(active.request_id))


def _rebuild(submit: worker_pb2.Submit, now: float) -> ActiveRequest:
    """The request as its first gateway had submitted it. Its latency counts from now on: the stamps of the
    first gateway died with it."""
    request = PreparedRequest(
        request_id=submit.request_id,
        prompt_token_ids=list(submit.prompt_token_ids),
        params=sampling_from_proto(submit.sampling),
        sampling=submit.sampling,
        slo=slo_from_proto(submit.slo, Slo()),
        received_at=now,
        tokenised_at=now,
    )
    return ActiveRequest(request, submit.attempt)


def _resume(request_id: str) -> worker_pb2.GatewayMessage:
    return worker_pb2.GatewayMessage(resume=worker_pb2.Resume(request_id=request_id))
