"""What a worker remembers of requests: who gets their tokens, and which it has emitted, until that is
acknowledged.

A gateway that lost its stream, or another one, can so take a request over without losing a token. Memory is
bounded: live requests by the schedulers' queues, ended ones by number and age.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

from ..proto.ids import HandoffKey
from ..proto.inference_pb2 import TokenLogprobs
from ..proto.worker_pb2 import Resumed, SequenceOutput, Submit, Terminal


@dataclass(slots=True, kw_only=True)
class Retained:
    """One request's newest attempt."""

    submit: Submit
    gateway_id: str
    since: float
    """Worker clock at which the submit came."""
    token_ids: list[int]
    """From index 0 on."""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    terminal: Terminal | None = None
    ended_at: float = 0.0

    @property
    def key(self) -> HandoffKey:
        return HandoffKey(self.submit.request_id, self.submit.attempt)

    def to_resumed(self, now: float) -> Resumed:
        """Everything another gateway needs to go on."""
        resumed = Resumed(
            request_id=self.submit.request_id,
            client_request_id=self.submit.client_request_id,
            known=True,
            submit=self.submit,
            token_ids=self.token_ids,
            logprobs=self.logprobs,
            terminal=self.terminal,
        )
        resumed.submit.gateway_id = self.gateway_id
        resumed.submit.elapsed_s += now - self.since
        return resumed


class Retention:
    """Requests by id; at most `max_ended` that have ended, for at most `retain_s` seconds each."""

    def __init__(self, max_ended: int, retain_s: float) -> None:
        self._max_ended = max_ended
        self._retain_s = retain_s
        self._live: dict[str, Retained] = {}
        self._ended: OrderedDict[str, Retained] = OrderedDict()
        self._redirects: OrderedDict[str, tuple[str, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._live) + len(self._ended)

    def get(self, request_id: str) -> Retained | None:
        return self._live.get(request_id) or self._ended.get(request_id)

    def find(self, client_request_id: str) -> Retained | None:
        """The newest request that a client calls so."""
        known = [*self._live.values(), *self._ended.values()]
        named = [retained for retained in known if retained.submit.client_request_id == client_request_id]
        return max(named, key=lambda retained: retained.since - retained.submit.elapsed_s, default=None)

    def open(self, submit: Submit, gateway_id: str, now: float) -> Retained:
        """Remembers a new attempt in place of what was known of the request."""
        self._ended.pop(submit.request_id, None)
        retained = Retained(
            submit=submit, gateway_id=gateway_id, since=now, token_ids=list(submit.emitted_token_ids)
        )
        self._live[submit.request_id] = retained
        return retained

    def record(self, output: SequenceOutput, now: float) -> Retained | None:
        """Adds an output; None when it belongs to no attempt that is live here, so nobody may get it."""
        retained = self._live.get(output.request_id)
        if retained is None or retained.submit.attempt != output.attempt:
            return None
        retained.token_ids += output.token_ids
        retained.logprobs += output.logprobs
        if output.HasField("terminal"):
            retained.terminal = output.terminal
            retained.ended_at = now
            self._ended[output.request_id] = self._live.pop(output.request_id)
            while len(self._ended) > self._max_ended:
                self._ended.popitem(last=False)
        return retained

    def acknowledge(self, request_id: str, attempt: int) -> None:
        """The gateway has the terminal event of this attempt."""
        ended = self._ended.get(request_id)
        if ended is not None and ended.submit.attempt <= attempt:
            del self._ended[request_id]

    def retire(self, key: HandoffKey) -> None:
        """Forgets an attempt that goes on elsewhere."""
        live = self._live.get(key.request_id)
        if live is not None and live.key == key:
            del self._live[key.request_id]

    def redirect(self, request_id: str, gateway_id: str, now: float) -> None:
        """A gateway took over a request that is not here yet: its hand-off may be on the way."""
        self._redirects[request_id] = (gateway_id, now)
        while len(self._redirects) > self._max_ended:
            self._redirects.popitem(last=False)

    def redirected(self, request_id: str) -> str | None:
        """Who took the request over before it came, once."""
        found = self._redirects.pop(request_id, None)
        return found[0] if found else None

    def expire(self, now: float) -> None:
        """Forgets what ended, or was announced, longer than retain_s ago."""
        before = now - self._retain_s
        while self._ended and next(iter(self._ended.values())).ended_at <= before:
            self._ended.popitem(last=False)
        while self._redirects and next(iter(self._redirects.values()))[1] <= before:
            self._redirects.popitem(last=False)

    def live_of(self, gateway_ids: Iterable[str]) -> list[Retained]:
        """Live requests whose tokens go to these gateways."""
        wanted = set(gateway_ids)
        return [retained for retained in self._live.values() if retained.gateway_id in wanted]
