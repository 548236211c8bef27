"""Layers are pushed in groups, once each, whichever of the engine's calls arrive in time."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

from diphase.prefill_workers.layer_pushes import LayeredChunk, LayerPushes
from diphase.proto.ids import HandoffKey

Pushed = tuple[str, int, int, int]


class Recorder:
    def __init__(self) -> None:
        self.pushed: list[Pushed] = []
        self.threads: set[int] = set()

    def __call__(
        self, key: HandoffKey, block_ids: Sequence[int], num_tokens: int, first_layer: int, num_layers: int
    ) -> None:
        self.threads.add(threading.get_ident())
        self.pushed.append((key.request_id, num_tokens, first_layer, num_layers))


def chunk(name: str, *stops: int) -> LayeredChunk:
    return LayeredChunk(key=HandoffKey(name, 0), block_ids=[0], num_tokens=16, stops=stops)


async def test_groups_leave_as_they_are_complete_and_the_rest_at_the_end() -> None:
    recorder = Recorder()
    pushes = LayerPushes([chunk("a", 4, 8, 10), chunk("b", 3, 6, 10)], 10, recorder)
    for layer in range(8):
        pushes.on_layer(layer)
    await asyncio.sleep(0)
    assert recorder.pushed == [("b", 16, 0, 3), ("a", 16, 0, 4), ("b", 16, 3, 3), ("a", 16, 4, 4)]
    pushes.finish()
    assert recorder.pushed[4:] == [("a", 16, 8, 2), ("b", 16, 6, 4)]


async def test_what_arrives_after_the_end_pushes_nothing_twice() -> None:
    recorder = Recorder()
    pushes = LayerPushes([chunk("a", 2, 4)], 4, recorder)
    for layer in range(4):
        pushes.on_layer(layer)
    pushes.finish()
    await asyncio.sleep(0)
    assert recorder.pushed == [("a", 16, 0, 4)]


async def test_a_chunk_that_goes_whole_leaves_at_the_end() -> None:
    recorder = Recorder()
    pushes = LayerPushes([chunk("a", 4)], 4, recorder)
    for layer in range(3):
        pushes.on_layer(layer)
    await asyncio.sleep(0)
    assert recorder.pushed == []
    pushes.finish()
    assert recorder.pushed == [("a", 16, 0, 4)]


async def test_pushes_happen_on_the_event_loop_whatever_thread_the_engine_has() -> None:
    recorder = Recorder()
    pushes = LayerPushes([chunk("a", 1, 2)], 2, recorder)
    await asyncio.get_running_loop().run_in_executor(None, pushes.on_layer, 0)
    await asyncio.sleep(0)
    pushes.finish()
    assert recorder.pushed == [("a", 16, 0, 1), ("a", 16, 1, 1)]
    assert recorder.threads == {threading.get_ident()}
