"""One client call, free of gRPC: turns a request's tokens into the messages that the client gets."""

from __future__ import annotations

from ..proto import inference_pb2 as pb
from ..proto.clock import Clock
from .active_request import RequestStream, Tokens
from .dispatcher import Dispatcher
from .text import TextStream


class Generation:
    """The messages of one call, from token `resume_from` on. Text is made from token 0 on all the same, so
    that a re-attached client gets the text that it would have got."""

    __slots__ = ("_clock", "_dispatcher", "_resume_from", "_stream", "_text", "finished")

    def __init__(
        self,
        dispatcher: Dispatcher,
        stream: RequestStream,
        text: TextStream,
        clock: Clock,
        resume_from: int = 0,
    ) -> None:
        self._dispatcher = dispatcher
        self._stream = stream
        self._text = text
        self._clock = clock
        self._resume_from = resume_from
        self.finished = False
        """The last message was given out."""

    async def next(self) -> pb.GenerateResponse:
        """The next message; it counts as written to the client now.

        Raises:
            DiphaseError: the request failed.
        """
        while True:
            response = self._respond(await self._stream.next())
            if response is not None:
                return response

    def delivered(self) -> None:
        """The last message is on its way to the client."""
        self._stream.active.delivered = True

    def close(self) -> None:
        """Ends the call; a request that has not finished is cancelled. Idempotent."""
        self._dispatcher.close(self._stream)

    def _respond(self, tokens: Tokens) -> pb.GenerateResponse | None:
        active = self._stream.active
        finish = tokens.finish_reason
        token_ids = tokens.token_ids
        repeated = min(len(token_ids), max(0, self._resume_from - tokens.first))
        # A worker's stop is its last token: eos or a stop token, which has no text.
        spoken = len(token_ids) - 1 if finish == pb.FINISH_REASON_STOP and token_ids else len(token_ids)
        text, used, stopped = "", 0, False
        if repeated:
            _, used, stopped = self._text.push(token_ids[: min(repeated, spoken)])
        if not stopped:
            text, more, stopped = self._text.push(token_ids[repeated:spoken])
            used = repeated + more
        if stopped:
            self._dispatcher.stop(self._stream)
            finish = pb.FINISH_REASON_STOP
            token_ids = token_ids[:used]
            repeated = min(repeated, used)
        elif finish:
            text += self._text.finish()
        new_ids = token_ids[repeated:]
        if not new_ids and not text and not finish:
            return None
        self._stamp(len(new_ids))
        first = tokens.first + repeated
        response = pb.GenerateResponse(
            request_id=active.client_request_id, index=first, token_ids=new_ids, text=text
        )
        if tokens.logprobs:
            response.logprobs.extend(tokens.logprobs[repeated : repeated + len(new_ids)])
        if finish:
            self._conclude(response, finish, first + len(new_ids))
        return response

    def _stamp(self, num_tokens: int) -> None:
        if not num_tokens:
            return
        times, now = self._stream.active.times, self._clock.now()
        if times.first_written_at is not None:
            self._dispatcher.metrics.token_gap((now - times.last_written_at) / num_tokens)
        times.written(num_tokens, now)

    def _conclude(self, response: pb.GenerateResponse, finish: int, num_tokens: int) -> None:
        active = self._stream.active
        times = active.times
        response.finish_reason = finish  # type: ignore[assignment]
        response.usage.prompt_tokens = len(active.request.prompt_token_ids)
        response.usage.completion_tokens = num_tokens
        response.usage.cached_tokens = times.cached_tokens
        response.stages.CopyFrom(times.stages())
        response.slo = times.verdict(active.request.slo).value
        self.finished = True
