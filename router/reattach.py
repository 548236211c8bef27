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
from .journal import Journal, JournalRecord, JournalUnavailable
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
        self.request_id = ""
        """What the workers call it; empty while nobody has said."""
        self.unasked: set[str] = set()
        """Workers that have no stream yet: asked when they do."""
        self.silent: set[str] = set()
        self.candidates: list[worker_pb2.Submit] = []
        """Requests that the client may mean."""
        self.found: ActiveRequest | None = None
        self.stream: RequestStream | None = None
        """Of what was found; its reader is whoever searches."""
        self.answers = asyncio.Event()

    def question(self, client_request_id: str) -> worker_pb2.GatewayMessage:
        resume = worker_pb2.Resume(request_id=self.request_id, client_request_id=client_request_id)
        return worker_pb2.GatewayMessage(resume=resume)

    def answered(self, worker: WorkerHandle) -> None:
        self.unasked.discard(worker.worker_id)
        self.silent.discard(worker.worker_id)
        # A decode worker knows every token; a prefill worker's answer leaves the question of the other, and a
        # failure that of a newer attempt.
        whole = self.found is not None and self.found.decoding and self.found.error is None
        if whole or not (self.silent or self.unasked):
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

    async def find(self, client_request_id: str) -> ActiveRequest:
        """Raises:
        NotFound: no such request runs.
        WorkerLost: it ran, and whoever had it is lost.
        InvalidRequest: another call is re-attaching to it right now.
        """
        record, may_be_lost = await self._lookup(client_request_id)
        if client_request_id in self._searches:
            raise InvalidRequest(
                f"another call is re-attaching to request {client_request_id!r}; keep that one"
            )
        search = self._searches[client_request_id] = _Search()
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._search(client_request_id, search, record)
        except TimeoutError:
            logger.warning(
                "resume_unanswered request_id=%s workers=%s",
                client_request_id, sorted(search.silent | search.unasked),
            )  # fmt: skip
        except asyncio.CancelledError:
            # Its client left: what was found meanwhile has no reader, unless another call took it.
            if search.stream is not None:
                self._close(search.stream)
            raise
        finally:
            del self._searches[client_request_id]
        if search.found is not None:
            return search.found
        if may_be_lost or search.request_id:
            raise WorkerLost(
                f"request {client_request_id!r} was lost with its gateway and its worker; send it again",
                retry_after_s=1.0,
            )
        raise NotFound(f"no request {client_request_id!r} is known; start it without resume_from")

    async def _search(self, client_request_id: str, search: _Search, record: JournalRecord | None) -> None:
        """Fills `search`. What a client calls a request need not be unique: the workers are asked which one
        it is, if the journal does not know, and then for that one."""
        workers = self._pool.handles()
        if record is not None:
            search.request_id = record.request_id
            named = [self._pool.get(worker_id) for worker_id in (record.prefill, record.decode)]
            workers = [worker for worker in named if worker is not None]
        for round_ in range(ROUNDS):
            if round_:
                await asyncio.sleep(BETWEEN_ROUNDS_S)
            if not search.request_id:
                await self._ask(client_request_id, search, workers)
                if search.candidates:
                    search.request_id = min(search.candidates, key=lambda s: s.elapsed_s).request_id
            if search.request_id:
                await self._ask(client_request_id, search, workers)
            if search.found is not None:
                return

    def resumed(self, worker: WorkerHandle, message: worker_pb2.Resumed) -> None:
        """A worker's answer."""
        search = self._searches.get(message.client_request_id)
        if search is not None and message.request_id != search.request_id:
            search = None  # it answers an older question
        if not message.request_id:
            if search is not None and message.known:
                search.candidates.append(message.submit)
        elif message.known:
            active = self._active.get(message.request_id)
            if active is not None or search is not None:
                known = active or _rebuild(message.submit, self._clock.now())
                if message.submit.attempt > known.attempt:
                    known.supersede(message.submit.attempt)
                if message.submit.attempt == known.attempt:
                    self._merge(known, worker, message)
                if active is None:
                    self._adopt(known)
                    if search is not None:
                        search.stream = known.stream
                if search is not None:
                    search.found = known
        if search is not None:
            search.answered(worker)

    def lost(self, worker: WorkerHandle) -> None:
        """It will not answer."""
        for search in self._searches.values():
            search.answered(worker)

    def available(self, worker: WorkerHandle) -> None:
        """It can be asked now."""
        for client_request_id, search in self._searches.items():
            if worker.worker_id in search.unasked:
                search.unasked.discard(worker.worker_id)
                search.silent.add(worker.worker_id)
                worker.send(search.question(client_request_id))

    async def _ask(self, client_request_id: str, search: _Search, workers: list[WorkerHandle]) -> None:
        """Returns when each has answered or is lost, or when one has said everything."""
        search.answers.clear()
        search.silent = {worker.worker_id for worker in workers if worker.usable}
        search.unasked = {worker.worker_id for worker in workers} - search.silent
        for worker in workers:
            if worker.usable:
                worker.send(search.question(client_request_id))
        if workers:
            await search.answers.wait()

    async def _lookup(self, client_request_id: str) -> tuple[JournalRecord | None, bool]:
        """What the journal knows; and whether the request may have been lost, since a journal that is away
        tells nothing.

        Raises:
            NotFound: it is over.
        """
        try:
            record = await self._journal.lookup(client_request_id)
        except JournalUnavailable as exc:
            logger.warning("resume_without_journal request_id=%s error=%s", client_request_id, exc)
            return None, True
        if record is not None and record.ended:
            raise NotFound(f"request {client_request_id!r} is over ({record.state}); start a new one")
        return record, record is not None

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
    """The request as its first gateway had submitted it. The stamps of that gateway died with it, all but how
    long ago the request came: its TTFT ends with the first token that this gateway writes."""
    request = PreparedRequest(
        request_id=submit.request_id,
        client_request_id=submit.client_request_id,
        prompt_token_ids=list(submit.prompt_token_ids),
        sampling=submit.sampling,
        slo=slo_from_proto(submit.slo, Slo()),
        received_at=now - submit.elapsed_s,
        tokenised_at=now - submit.elapsed_s,
    )
    return ActiveRequest(request, submit.attempt)
