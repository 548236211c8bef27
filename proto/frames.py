"""How many messages one frame of a worker stream takes, in either direction."""

from __future__ import annotations

from collections import deque
from typing import TypeVar

from google.protobuf.message import Message

from .rpc import MAX_MESSAGE_BYTES

MESSAGES_A_FRAME = 256
FRAME_BYTES = MAX_MESSAGE_BYTES // 4
"""Where a frame ends that has much to carry: far below the size limit of a message. A frame of one message
may be larger."""

M = TypeVar("M", bound=Message)


def take_frame(queue: deque[M]) -> list[M]:
    """Removes the oldest messages that one frame may hold from a queue that is not empty; at least one."""
    messages = [queue.popleft()]
    size_bytes = messages[0].ByteSize() if queue else 0
    while queue and len(messages) < MESSAGES_A_FRAME:
        size_bytes += queue[0].ByteSize()
        if size_bytes > FRAME_BYTES:
            break
        messages.append(queue.popleft())
    return messages
