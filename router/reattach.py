"""Finds a running request that another gateway accepted: asks the journal for its workers, and them for it.

A decode worker that is asked before its hand-off came remembers who asked, and sends what follows there.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from ..proto import inference_pb2, worker_pb2
from ..proto.clock import Clock
from ..proto.errors import InvalidRequest, NotFound, WorkerLost, from_wire
from ..proto.slo import Slo, slo_from_proto
from .active_request import ActiveRequest, RequestStream
from .journal import Journal, JournalUnavailable
from .text import PreparedRequest
from .worker_handle import WorkerHandle
from .workers import WorkerPool

logger = logging.getLogger(__name__)

ROUNDS = 2
"""Times that every worker is asked: in the first the request may be on its way from one to the other."""
BETWEEN_ROUNDS_S = 0.2


class _Search:
    """One request that is being looked for."""

    def __init__(self) -> None:
        self.silent: set[str] = set()
        self.answers = asyncio.Event()
        self.adopted: RequestStream | None = None
        """Of the request, once it is found; its reader is whoever searches."""

    def answered(self, worker: WorkerHandle) -> None:
        self.silent.discard(worker.worker_id)
        if not self.silent:
            self.answers.set()


class Reattacher:
    """Searches under way. A request that is found is in `active` from the first worker's answer on, since its
    tokens follow on the same stream."""

    def __init__(
        self,
        *,
        pool: WorkerPool,
        journal: Journal,
        timeout_s: float,
        active: dict[str, ActiveRequest],
        adopt: Callable[[ActiveRequest], None],
        close: Callable[[RequestStream], None],
        clock: Clock,
    ) -> None:
        self._pool = pool
        self._journal = journal
        self._timeout_s = timeout_s
        self._active = active
        self._adopt = adopt
        self._close = close
        self._clock = clock
        self._searches: dict[str, _Search] = {}

    async def find(self, request_id: str) -> ActiveRequest:
        """Raises:
        NotFound: no such request runs.
        WorkerLost: it ran, and whoever had it is lost.
        InvalidRequest: another call is re-attaching to it right now.
        """
        workers, journalled = await self._candidates(request_id)
        if request_id in self._searches:
            raise InvalidRequest(f"another call is re-attaching to request {request_id!r}; keep that one")
        search = self._searches[request_id] = _Search()
        try:
            async with asyncio.timeout(self._timeout_s):
                for round_ in range(ROUNDS):
                    if round_:
                        await asyncio.sleep(BETWEEN_ROUNDS_S)
                    await self._ask(request_id, search, workers)
                    if request_id in self._active:
                        break
        except TimeoutError:
            logger.warning("resume_unanswered request_id=%s workers=%s", request_id, sorted(search.silent))
        except asyncio.CancelledError:
            # Its client left: what was found meanwhile has no reader, unless another call took it.
            if search.adopted is not None:
                self._close(search.adopted)
            raise
        finally:
            del self._searches[request_id]
        active = self._active.get(request_id)
        if active is None and not journalled:
            raise NotFound(f"no request {request_id!r} is known; start it without resume_from")
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
            known = active or _rebuild(message.submit, self._clock.now())
            if message.submit.attempt == known.attempt:
                self._merge(known, worker, message)
            if active is None:
                self._adopt(known)
                if search is not None:
                    search.adopted = known.stream
        if search is not None:
            search.answered(worker)

    def lost(self, worker: WorkerHandle) -> None:
        """It will not answer."""
        for search in self._searches.values():
            search.answered(worker)

    async def _ask(self, request_id: str, search: _Search, workers: list[WorkerHandle]) -> None:
        """Returns when each has answered or is lost."""
        asked = [worker for worker in workers if worker.usable]
        search.answers.clear()
        search.silent = {worker.worker_id for worker in asked}
        for worker in asked:
            worker.send(worker_pb2.GatewayMessage(resume=worker_pb2.Resume(request_id=request_id)))
        if asked:
            await search.answers.wait()

    async def _candidates(self, request_id: str) -> tuple[list[WorkerHandle], bool]:
        """The workers to ask: those that the journal names, or every one when it is away or knows nothing,
        since a gateway that was killed takes its last records along. And whether the request may have been
        lost."""
        try:
            record = await self._journal.lookup(request_id)
        except JournalUnavailable as exc:
            logger.warning("resume_without_journal request_id=%s error=%s", request_id, exc)
            return self._pool.handles(), True
        if record is None:
            return self._pool.handles(), False
        if record.ended:
            raise NotFound(f"request {request_id!r} is over ({record.state}); start a new one")
        named = [self._pool.get(worker_id) for worker_id in (record.prefill, record.decode)]
        return [worker for worker in named if worker is not None], True

    def _merge(self, active: ActiveRequest, worker: WorkerHandle, message: worker_pb2.Resumed) -> None:
        """Takes in what one of its workers knows."""
        times = active.times
        times.attempts = message.submit.attempt + 1
        if worker.role == "prefill":
            active.prefill = worker
            active.decode = active.decode or self._pool.get(message.submit.decode.worker_id)
        else:
            active.decode = worker
            active.decoding = True
        times.prefill_worker = (active.prefill or worker).worker_id
        times.decode_worker = active.decode.worker_id if active.decode is not None else ""
        token_ids = list(message.token_ids)
        missing = len(token_ids) - len(message.logprobs) if message.logprobs else 0
        logprobs = [inference_pb2.TokenLogprobs()] * missing + list(message.logprobs)
        active.take(0, token_ids, logprobs)
        if not message.HasField("terminal"):
            return
        terminal = message.terminal
        if terminal.finish_reason:
            active.finisher = worker
            active.take_terminal(len(token_ids), terminal.finish_reason)
        elif worker is active.decode or active.needs_prefill:
            active.fail(from_wire(terminal.error.code or WorkerLost.code, terminal.error.message))


def _rebuild(submit: worker_pb2.Submit, now: float) -> ActiveRequest:
    """The request as its first gateway had submitted it. Its latency counts from now on: the stamps of the
    first gateway died with it."""
    request = PreparedRequest(
        request_id=submit.request_id,
        prompt_token_ids=list(submit.prompt_token_ids),
        sampling=submit.sampling,
        slo=slo_from_proto(submit.slo, Slo()),
        received_at=now,
        tokenised_at=now,
    )
    return ActiveRequest(request, submit.attempt)
