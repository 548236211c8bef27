"""KV elements as fp32 and back, in numpy, which has no bf16 and converts fp16 slowly. Knows no codecs.

bf16 is the upper half of fp32, so integers do: a shift one way, round to nearest even the other.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...proto.kv_layout import ITEM_BYTES

Floats = NDArray[np.float32]
Bits = NDArray[np.unsignedinteger[Any]]

TILE_ITEMS = 1 << 16
"""Elements converted at a time: the fp32 of a tile stays in a core's second-level cache."""


def as_bits(buffer: memoryview, dtype: str) -> Bits:
    """The elements of a buffer as unsigned integers of their size."""
    return np.frombuffer(buffer, np.uint16 if ITEM_BYTES[dtype] == 2 else np.uint32)


def to_floats(bits: Bits, dtype: str) -> Floats:
    """fp32 of elements given by their bits, any shape."""
    if dtype == "fp32":
        return bits.astype(np.uint32).view(np.float32)
    if dtype == "bf16":
        wide = bits.astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    # fp16: exponent and fraction moved into fp32's place read 2^112 too small.
    magnitude = (bits & 0x7FFF).astype(np.uint32)
    special = magnitude >= 0x7C00
    magnitude <<= 13
    floats = magnitude.view(np.float32)
    floats *= np.float32(2.0**112)
    magnitude[special] |= 0x7F800000  # infinite or not a number
    magnitude |= (bits & 0x8000).astype(np.uint32) << 16
    return floats


def store_floats(floats: Floats, dtype: str, out: Bits) -> None:
    """Writes `floats`, whose content is lost, as elements to `out` of the same shape."""
    if dtype == "fp32":
        np.copyto(out, floats.view(np.uint32))
    elif dtype == "bf16":
        bits = floats.view(np.uint32)
        odd = bits >> 16
        odd &= 1
        bits += odd
        bits += 0x7FFF
        bits >>= 16
        np.copyto(out, bits, casting="unsafe")
    else:
        np.copyto(out.view(np.float16), floats, casting="unsafe")


def largest_magnitudes(bits: Bits, dtype: str) -> Floats:
    """Largest absolute value along the last axis, fp32; not finite where an element is not.

    Magnitudes order as their bits do, and integers are reduced many times faster than floats.
    """
    mask = 0x7FFF if ITEM_BYTES[dtype] == 2 else 0x7FFFFFFF
    return to_floats((bits & mask).max(axis=-1), dtype)
