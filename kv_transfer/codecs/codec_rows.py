"""The frame that `int8` and `fp8` share: one scale and one byte an element for each row of head_dim elements,
which is one token's K or V of one head and layer.

A payload is head, scales (upper halves of fp32, [num_rows]), values (uint8 [num_rows, head_dim]). Knows
no number formats: a codec gives the largest magnitude of its byte format and the two conversions.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ...proto.errors import TransferError
from .codec import HEAD_BYTES, KvSpec, check_head, check_sizes, write_head
from .codec_floats import TILE_ITEMS, Floats, as_bits, largest_magnitudes, store_floats, to_floats

_SCALE_BYTES = 2
_SMALLEST_NORMAL = np.float32(2.0**-126)


class ScaledRowsCodec:
    """Implements Codec for formats of one byte an element. A row with an element that is not finite comes
    back as a row of such: broken KV stays visibly broken."""

    name: str
    codec_id: int
    version = 1
    lossless = False
    largest: float
    """Magnitude that the largest element of a row is scaled to."""

    def to_bytes(self, scaled: Floats, out: NDArray[np.uint8]) -> None:
        """Writes `scaled`, whose content is lost, as bytes of the format."""
        raise NotImplementedError

    def from_bytes(self, values: NDArray[np.uint8]) -> Floats:
        """What the bytes of the format stand for."""
        raise NotImplementedError

    def max_bytes(self, spec: KvSpec) -> int:
        return HEAD_BYTES + spec.num_rows * (_SCALE_BYTES + spec.layout.head_dim)

    def encode(self, kv: memoryview, spec: KvSpec, out: memoryview) -> int:
        length = self.max_bytes(spec)
        check_sizes(kv, spec, out, length)
        write_head(out, spec, self.codec_id, self.version)
        scales, values = _parts(out, spec)
        bits = as_bits(kv, spec.layout.dtype).reshape(spec.num_rows, spec.layout.head_dim)
        with np.errstate(all="ignore"):
            for rows in _tiles(spec):
                tile = bits[rows]
                scale = largest_magnitudes(tile, spec.layout.dtype)
                scale *= np.float32(1.0 / self.largest)
                scale[scale < _SMALLEST_NORMAL] = 0.0
                # Rounded up, so that no element of the row leaves the format's range.
                upper = (scale.view(np.uint32) + np.uint32(0xFFFF)) >> 16
                scales[rows] = upper
                inverse = np.reciprocal((upper << 16).view(np.float32))
                inverse[upper == 0] = 0.0
                floats = to_floats(tile, spec.layout.dtype)
                floats *= inverse[:, None]
                self.to_bytes(floats, values[rows])
        return length

    def decode(self, data: memoryview, spec: KvSpec, out: memoryview) -> None:
        check_head(data, spec, self.codec_id, self.version, out)
        if data.nbytes != self.max_bytes(spec):
            raise TransferError(
                f"the payload's length is {data.nbytes} where {self.max_bytes(spec)} is expected"
            )
        scales, values = _parts(data, spec)
        bits = as_bits(out, spec.layout.dtype).reshape(spec.num_rows, spec.layout.head_dim)
        with np.errstate(all="ignore"):
            for rows in _tiles(spec):
                floats = self.from_bytes(values[rows])
                floats *= to_floats(scales[rows], "bf16")[:, None]
                store_floats(floats, spec.layout.dtype, bits[rows])


def _parts(payload: memoryview, spec: KvSpec) -> tuple[NDArray[np.uint16], NDArray[np.uint8]]:
    """Scales and values in a payload that is long enough."""
    scales = np.frombuffer(payload, np.uint16, spec.num_rows, HEAD_BYTES)
    head_dim = spec.layout.head_dim
    at = HEAD_BYTES + scales.nbytes
    values = np.frombuffer(payload, np.uint8, spec.num_rows * head_dim, at)
    return scales, values.reshape(spec.num_rows, head_dim)


def _tiles(spec: KvSpec) -> Iterator[slice]:
    step = max(1, TILE_ITEMS // spec.layout.head_dim)
    for begin in range(0, spec.num_rows, step):
        yield slice(begin, min(begin + step, spec.num_rows))
