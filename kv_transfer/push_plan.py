"""Which blocks and layers to push next: pure arithmetic on how far each layer is computed and pushed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Piece(NamedTuple):
    """A range of blocks of the sequence and a range of layers of each."""

    first_block: int
    num_blocks: int
    first_layer: int
    num_layers: int


def push_stops(num_layers: int, layers_per_push: int, *, last: bool) -> tuple[int, ...]:
    """After how many layers of a step those that are computed are pushed. Of the `last` step of a prompt
    the final group is cut ever shorter: what is left to send when the last layer is there is one layer."""
    stops = list(range(layers_per_push, num_layers + 1, layers_per_push))
    if not stops or stops[-1] < num_layers:
        stops.append(num_layers)
    if not last or layers_per_push >= num_layers:
        return tuple(stops)
    at, end = stops[-2], stops.pop()
    while at < end:
        at += max(1, (end - at) * 6 // 10)
        stops.append(at)
    return tuple(stops)


def advance(ready: Sequence[int], num_blocks: int, first_layer: int, num_layers: int) -> tuple[int, ...]:
    """`ready` (leading computed blocks of each layer) after these layers computed `num_blocks`."""
    layers = range(first_layer, first_layer + num_layers)
    return tuple(max(have, num_blocks) if layer in layers else have for layer, have in enumerate(ready))


def pieces(ready: Sequence[int], pushed: Sequence[int], max_runs: int) -> Iterator[Piece]:
    """What is ready and not pushed. Neighbouring layers that are equally far go together; a piece of more
    than `max_runs` layers times blocks is split along the blocks."""
    layer = 0
    while layer < len(ready):
        begin, end, first_layer = pushed[layer], ready[layer], layer
        while layer < len(ready) and (pushed[layer], ready[layer]) == (begin, end):
            layer += 1
        num_layers = layer - first_layer
        blocks = max(1, max_runs // num_layers)
        for first_block in range(begin, end, blocks):
            yield Piece(first_block, min(blocks, end - first_block), first_layer, num_layers)
