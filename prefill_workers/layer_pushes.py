"""Pushes the layers of a running step to the decode side while later layers are computed.

The engine calls `on_layer` on its own thread; everything else happens on the event loop. `finish` pushes what
no call has pushed yet, so that nothing depends on which of the two comes first.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..proto.ids import HandoffKey


@dataclass(slots=True, kw_only=True)
class LayeredChunk:
    """One chunk of the step whose hand-off goes layer by layer."""

    key: HandoffKey
    block_ids: list[int]
    num_tokens: int
    """Computed when the step is done."""
    stops: tuple[int, ...]
    """After how many layers to push, ascending; all of them at the end."""
    pushed_layers: int = 0


Push = Callable[[HandoffKey, Sequence[int], int, int, int], None]
"""(key, block_ids, num_tokens, first_layer, num_layers)"""


class LayerPushes:
    """Those of one step."""

    def __init__(self, chunks: list[LayeredChunk], num_layers: int, push: Push) -> None:
        self._chunks = chunks
        self._num_layers = num_layers
        self._push = push
        self._loop = asyncio.get_running_loop()
        # Not every layer wakes the loop: each wake takes the interpreter from the engine's thread for a
        # moment.
        self._stops = {stop for chunk in chunks for stop in chunk.stops}

    def on_layer(self, layer: int) -> None:
        """The engine's LayerHook; runs on its thread."""
        if layer + 1 in self._stops:
            self._loop.call_soon_threadsafe(self._layers_done, layer + 1)

    def finish(self) -> None:
        """The step is done: every layer is in the pool."""
        self._layers_done(self._num_layers)

    def _layers_done(self, count: int) -> None:
        for chunk in self._chunks:
            whole = max((stop for stop in chunk.stops if stop <= count), default=0)
            first = chunk.pushed_layers
            if whole > first:
                chunk.pushed_layers = whole
                self._push(chunk.key, chunk.block_ids, chunk.num_tokens, first, whole - first)
