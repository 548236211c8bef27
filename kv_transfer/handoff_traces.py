"""What happened to the newest hand-offs of this worker, each with its time: every event that a machine
took, every action that it answered with and every state that it was in. Bounded; knows no transport and no
gateway."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, fields
from enum import StrEnum

from ..proto.ids import HandoffKey
from ..proto.worker_pb2 import TraceEvent
from . import machine as k
from .codecs.codec_choice import Choice

MAX_HANDOFFS = 256
MAX_ENTRIES = 400
"""Of one hand-off; of what comes after them only its states are kept, and the last one says so."""

Noted = k.Event | k.Action | Choice | StrEnum
"""A StrEnum: the state that it is in from then on."""
Entry = tuple[float, Noted]

_LEFT_OUT = (k.Tick, k.SendProgress, k.PeerProgressed)
"""They come again and again and decide nothing by themselves."""


@dataclass(frozen=True, slots=True)
class _Span:
    """Two entries that are the ends of one thing, of one part where they have one."""

    name: str
    end: type


_SPANS: dict[type, _Span] = {
    k.Push: _Span("push", k.WriteEnded),
    k.Check: _Span("verify", k.PartChecked),
    k.StartFence: _Span("fence", k.FenceEnded),
}


class TraceBook:
    """Entries by hand-off; of too many the oldest is forgotten."""

    def __init__(self) -> None:
        self._handoffs: OrderedDict[HandoffKey, list[Entry]] = OrderedDict()

    def note(self, key: HandoffKey, at: float, what: Noted) -> None:
        """`at`: this worker's clock."""
        if isinstance(what, _LEFT_OUT):
            return
        entries = self._handoffs.get(key)
        if entries is None:
            entries = self._handoffs[key] = []
            if len(self._handoffs) > MAX_HANDOFFS:
                self._handoffs.popitem(last=False)
        if len(entries) < MAX_ENTRIES or isinstance(what, StrEnum):
            entries.append((at, what))

    def events(self, request_id: str) -> list[TraceEvent]:
        """Of every attempt that is known, on this worker's clock."""
        found: list[TraceEvent] = []
        for key, entries in self._handoffs.items():
            if key.request_id == request_id:
                track = f"hand-off, attempt {key.attempt}"
                found.extend(_events(entries, track))
                if len(entries) >= MAX_ENTRIES:
                    at = entries[-1][0]
                    found.append(TraceEvent(begin_s=at, end_s=at, track=track, name="more was not kept"))
        return found


def _events(entries: list[Entry], track: str) -> Iterator[TraceEvent]:
    open_spans: dict[tuple[type, int], TraceEvent] = {}
    state: TraceEvent | None = None
    for at, what in entries:
        if isinstance(what, StrEnum):
            if state is not None:
                state.end_s = at
            state = TraceEvent(begin_s=at, end_s=at, track=f"{track}: state", name=what)
            yield state
            continue
        part = getattr(what, "part", -1)
        begun = open_spans.pop((type(what), part), None)
        if begun is not None:
            begun.end_s = at
            begun.detail = f"{begun.detail} {_detail(what, 'part')}".strip()
            continue
        span = _SPANS.get(type(what))
        name = span.name if span is not None else _words(type(what).__name__)
        event = TraceEvent(begin_s=at, end_s=at, track=track, name=name, detail=_detail(what))
        if span is not None:
            open_spans[span.end, part] = event
        yield event


def _words(name: str) -> str:
    """PeerGranted -> peer granted."""
    return "".join(f" {letter.lower()}" if letter.isupper() else letter for letter in name).strip()


def _detail(what: k.Event | k.Action | Choice, *without: str) -> str:
    shown = []
    for each in fields(what):
        value = getattr(what, each.name)
        if isinstance(value, k.Fault):
            shown.append(f"{value.code}: {value.message}")
        elif each.name not in without and value is not None:
            shown.append(f"{each.name}={value}")
    return " ".join(shown)
