"""An accepted request while it lives: its attempt, its tokens in order, and the stream that its client
reads."""

from __future__ import annotations

import asyncio
from typing import NamedTuple

from ..proto import inference_pb2 as pb
from ..proto import worker_pb2
from ..proto.errors import Cancelled, DiphaseError
from .attempts import Attempts
from .latency import RequestTimes
from .text import PreparedRequest
from .token_order import Logprobs, TokenOrder
from .worker_handle import WorkerHandle


class Tokens(NamedTuple):
    """What a client's stream gets: the tokens since the last time."""

    first: int
    """Index of the first."""
    token_ids: list[int]
    logprobs: list[pb.TokenLogprobs]
    finish_reason: int
    """FinishReason; 0 while more may come. Nothing follows a finish."""


class ActiveRequest(Attempts):
    """One request. It ends once: finished or failed; until then it moves from attempt to attempt."""

    __slots__ = (
        "_order",
        "_terminal",
        "delivered",
        "error",
        "finish_reason",
        "finisher",
        "give_up",
        "queued",
        "request",
        "stream",
        "times",
    )

    def __init__(self, request: PreparedRequest, attempt: int = 0) -> None:
        super().__init__(attempt)
        self.request = request
        self.times = RequestTimes(request.received_at, request.tokenised_at)
        self.queued = False
        """Counted by admission: it has no token yet."""
        self.give_up: asyncio.TimerHandle | None = None
        """Ends the wait for a placement."""
        self.finish_reason = 0
        self.error: DiphaseError | None = None
        self.finisher: WorkerHandle | None = None
        """The worker that has the terminal event, until it is acknowledged."""
        self.delivered = False
        """The last message was written to the client."""
        self.stream = RequestStream(self)
        self._order = TokenOrder()
        self._terminal: tuple[int, int] | None = (
            None  # (tokens in all, finish_reason) while tokens are missing
        )

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def client_request_id(self) -> str:
        return self.request.client_request_id

    @property
    def token_ids(self) -> list[int]:
        """Completion tokens so far, in order."""
        return self._order.token_ids

    @property
    def ended(self) -> bool:
        return bool(self.finish_reason) or self.error is not None

    @property
    def has_gap(self) -> bool:
        """See Attempts."""
        return self._order.has_gap

    def take(self, index: int, token_ids: list[int], logprobs: Logprobs) -> None:
        """Tokens from a worker, in any order, repeated or not."""
        if self.ended or not self._order.add(index, token_ids, logprobs):
            return
        self._try_finish()
        self.stream.wake()

    def take_terminal(self, num_tokens: int, finish_reason: int) -> None:
        """The worker has finished with so many tokens in all."""
        if not self.ended:
            self._terminal = (num_tokens, finish_reason)
            self._try_finish()
            self.stream.wake()

    def finish(self, finish_reason: int) -> None:
        """It ends with the tokens that it has. Idempotent."""
        if not self.ended:
            self.finish_reason = finish_reason
            self.stream.wake()

    def fail(self, error: DiphaseError) -> None:
        """It ends without its rest. Idempotent."""
        if not self.ended:
            self.error = error
            self.stream.wake()

    def next_attempt(self) -> None:
        """Leaves its workers; what they sent in order is kept."""
        super().next_attempt()
        self._terminal = None
        self._order.drop_early()

    def supersede(self, attempt: int) -> None:
        """A newer attempt than the one that was found first; how that one ended does not matter."""
        while self.attempt < attempt:
            self.next_attempt()
        self.error = None

    def reattach(self) -> RequestStream:
        """A stream from token 0; the one before it ends."""
        self.stream.detach(Cancelled(f"request {self.client_request_id} was re-attached by another call"))
        self.stream = RequestStream(self)
        return self.stream

    def since(self, taken: int) -> Tokens:
        """The tokens from `taken` on."""
        order = self._order
        complete = self.finish_reason
        if not taken:
            return Tokens(0, list(order.token_ids), list(order.logprobs), complete)
        return Tokens(taken, order.token_ids[taken:], order.logprobs[taken:], complete)

    def observe_prefill(self, worker: WorkerHandle, times: worker_pb2.PrefillTimes, now: float) -> None:
        """Token 0 came with its worker's stamps. A re-attached request has none of its own to add them to."""
        if worker.clock.known and self.times.submitted_at is not None:
            self.times.prefilled(times, worker.clock, now)

    def observe_handoff(self, worker: WorkerHandle, output: worker_pb2.SequenceOutput, now: float) -> bool:
        """The first token after a hand-off came; True when its time is known. A later attempt's hand-off is
        no part of token 1's delay."""
        self.times.handoff_bytes += output.decode.handoff_bytes
        self.times.handoff_segments += output.decode.handoff_segments
        if output.index != 1 or not worker.clock.known:
            return False
        self.times.handed_off(output.decode, worker.clock, now)
        return self.times.token0_at is not None

    def _try_finish(self) -> None:
        if self._terminal is not None and len(self._order.token_ids) >= self._terminal[0]:
            self.finish_reason = self._terminal[1]


class RequestStream:
    """What one client call reads."""

    __slots__ = ("_detached", "_taken", "_waiter", "active")

    def __init__(self, active: ActiveRequest) -> None:
        self.active = active
        self._taken = 0
        self._waiter: asyncio.Future[None] | None = None
        self._detached: DiphaseError | None = None

    async def next(self) -> Tokens:
        """The next tokens, at least one of them or a finish.

        Raises:
            DiphaseError: the request failed; tokens that came before were given out first.
        """
        active = self.active
        while True:
            if self._detached is not None:
                raise self._detached
            if self._taken < len(active.token_ids) or active.finish_reason:
                tokens = active.since(self._taken)
                self._taken += len(tokens.token_ids)
                return tokens
            if active.error is not None:
                raise active.error
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def detach(self, error: DiphaseError) -> None:
        """The request goes on without this stream."""
        self._detached = error
        self.wake()
