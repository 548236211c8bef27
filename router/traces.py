"""One request's way through gateway and workers on one time line."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

from ..proto.cluster_pb2 import GetTraceResponse
from ..proto.worker_pb2 import Inspected, TraceEvent
from .active_request import ActiveRequest
from .clock_offset import ClockOffset
from .latency import RequestTimes

MAX_REQUESTS = 1024
"""Requests whose times are remembered, running ones included."""
STAGES = "request"
"""The track of the stages that a gateway measures."""


class RecentRequests:
    """The times of the newest requests, by either name."""

    def __init__(self) -> None:
        self._times: OrderedDict[str, tuple[str, RequestTimes]] = OrderedDict()
        self._names: dict[str, str] = {}

    def add(self, active: ActiveRequest) -> None:
        """Its times are looked at when they are asked for."""
        self._times[active.request_id] = (active.client_request_id, active.times)
        self._names[active.client_request_id] = active.request_id
        if len(self._times) > MAX_REQUESTS:
            old, (name, _) = self._times.popitem(last=False)
            if self._names.get(name) == old:
                del self._names[name]

    def find(self, name: str) -> tuple[str, RequestTimes] | None:
        """The gateway's own id of a request, and its times; `name` may be the client's."""
        request_id = self._names.get(name, name)
        found = self._times.get(request_id)
        return None if found is None else (request_id, found[1])


def time_line(
    request_id: str,
    times: RequestTimes,
    gateway_id: str,
    answers: Mapping[str, Inspected],
    clocks: Mapping[str, ClockOffset],
) -> GetTraceResponse:
    """Seconds since the gateway received the request. Workers' stamps are converted by their clock offset,
    which is off by at most half a round trip."""
    events = [
        TraceEvent(begin_s=begin, end_s=end, where=where or gateway_id, track=STAGES, name=name)
        for name, where, begin, end in times.spans()
    ]
    for worker_id, answer in answers.items():
        clock = clocks[worker_id]
        for event in answer.events:
            event.where = worker_id
            event.begin_s, event.end_s = clock.to_gateway(event.begin_s), clock.to_gateway(event.end_s)
            events.append(event)
    for event in events:
        event.begin_s -= times.received_at
        event.end_s -= times.received_at
    events.sort(key=lambda event: event.begin_s)
    return GetTraceResponse(request_id=request_id, events=events)
