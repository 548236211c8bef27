"""Whether a reservation can be taken at all: its size, and whether a newer attempt was here. Room is another
matter."""

from __future__ import annotations

from collections import OrderedDict

from ..proto.errors import InvalidRequest, PromptTooLong, TransferError
from ..proto.handoff_pb2 import Reserve
from ..proto.ids import HandoffKey
from ..proto.kv_layout import KvLayout

REMEMBERED = 4096
"""Requests whose newest attempt is remembered."""


class NewestAttempts:
    """The newest attempt at each request of late, and whether it became ready."""

    def __init__(self) -> None:
        self._newest: OrderedDict[str, tuple[int, bool]] = OrderedDict()

    def begin(self, key: HandoffKey) -> HandoffKey | None:
        """Notes an attempt; returns the key of the older one that it overtakes, if any is known.

        Raises:
            TransferError: this attempt, or a newer one, has been here before.
        """
        known = self._newest.get(key.request_id)
        if known is not None and key.attempt <= known[0]:
            raise TransferError(f"attempt {key.attempt} is stale: attempt {known[0]} was here")
        self._note(key, ready=False)
        return None if known is None else HandoffKey(key.request_id, known[0])

    def ready(self, key: HandoffKey) -> None:
        self._note(key, ready=True)

    def was_ready(self, key: HandoffKey) -> bool:
        return self._newest.get(key.request_id) == (key.attempt, True)

    def _note(self, key: HandoffKey, *, ready: bool) -> None:
        self._newest[key.request_id] = (key.attempt, ready)
        self._newest.move_to_end(key.request_id)
        if len(self._newest) > REMEMBERED:
            self._newest.popitem(last=False)


def check_reservation(reserve: Reserve, layout: KvLayout, num_blocks: int) -> None:
    """`num_blocks` is the size of this worker's pool.

    Raises:
        InvalidRequest: it is empty, or names more block hashes than it has full blocks.
        PromptTooLong: it could not fit an empty pool.
    """
    if reserve.num_tokens < 1:
        raise InvalidRequest("a reservation needs at least one token")
    if len(reserve.block_hashes) > reserve.num_tokens // layout.block_size:
        raise InvalidRequest(f"{len(reserve.block_hashes)} block hashes for {reserve.num_tokens} tokens")
    needed = layout.num_blocks_for(reserve.num_tokens)
    if needed > num_blocks:
        raise PromptTooLong(
            f"{reserve.num_tokens} tokens need {needed} KV blocks, the decode worker has {num_blocks}"
        )
