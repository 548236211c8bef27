"""Between the messages of handoff.proto and the events of the machines."""

from __future__ import annotations

import struct
from typing import Any

from ..proto.errors import DiphaseError
from ..proto.handoff_pb2 import Abort, HandoffId, HandoffMessage, Pushed
from ..proto.ids import HandoffKey
from ..proto.worker_pb2 import WireError
from . import machine as k

_TAG = struct.Struct("<QI")


def message(key: HandoffKey, **kind: Any) -> HandoffMessage:
    """The message of one `kind` (a field of HandoffMessage) about a hand-off."""
    return HandoffMessage(id=handoff_id(key), **kind)


def handoff_id(key: HandoffKey) -> HandoffId:
    return HandoffId(request_id=key.request_id, attempt=key.attempt)


def key_of(handoff: HandoffId) -> HandoffKey:
    return HandoffKey(handoff.request_id, handoff.attempt)


def abort(key: HandoffKey, fault: k.Fault) -> HandoffMessage:
    return message(key, abort=Abort(error=wire_error(fault)))


def wire_error(fault: k.Fault) -> WireError:
    error: DiphaseError = fault.error()
    return WireError(code=fault.code, message=fault.message, retryable=error.retryable)


def fault_of(error: WireError) -> k.Fault:
    return k.Fault(error.code, error.message)


def prefill_event(received: HandoffMessage) -> k.Event | None:
    """What a message from the decode side is to the prefill machine; None: such a message never goes this
    way."""
    match received.WhichOneof("kind"):
        case "granted":
            return k.PeerGranted(received.granted.first_block, len(received.granted.block_ids))
        case "queued":
            return k.PeerQueued(received.queued.lease_s)
        case "refused":
            return k.PeerRefused(fault_of(received.refused.error))
        case "verified":
            return k.PeerVerified()
        case "abort":
            return k.PeerAborted(fault_of(received.abort.error))
    return None


def decode_event(received: HandoffMessage) -> k.Event | None:
    """What a message from the prefill side is to the decode machine; None: such a message never goes this
    way."""
    match received.WhichOneof("kind"):
        case "reserve":
            return k.PeerReserved()
        case "progress":
            return k.PeerProgressed(received.progress.computed_tokens)
        case "complete":
            return k.PeerCompleted(received.complete.num_parts, received.complete.recompute)
        case "abort":
            return k.PeerAborted(fault_of(received.abort.error))
    return None


def part_event(pushed: Pushed) -> k.PartArrived:
    return k.PartArrived(
        pushed.part, pushed.first_block, pushed.num_blocks, pushed.first_layer, pushed.num_layers
    )


def part_tag(ticket: int, part: int) -> bytes:
    """The tag of the write that brings a part."""
    return _TAG.pack(ticket, part)


def read_tag(tag: bytes) -> tuple[int, int] | None:
    """(ticket, part); None: it is no such tag."""
    return _TAG.unpack(tag) if len(tag) == _TAG.size else None
