"""KV as e4m3 floats (OCP 8-bit, 4 exponent and 3 fraction bits) with one scale for each token and head:
half of bf16. For pools whose other end computes in fp8; `int8` is closer at the same size.

The conversions are integer arithmetic: on a CPU they run several times faster than torch's casts.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .codec_floats import Floats
from .codec_rows import ScaledRowsCodec

_SMALLEST_NORMAL = np.float32(2.0**-6)
_ROUNDER = np.float32(2.0**14)
"""Added to a float below 2^-6 it leaves the multiple of 2^-9, e4m3's smallest step, in the lowest bits."""
_REBIAS = np.uint32((127 - 7) << 3)


class Fp8Codec(ScaledRowsCodec):
    """The largest magnitude of a row becomes 448, the format's largest; ties go to even."""

    name = "fp8"
    codec_id = 2
    largest = 448.0

    def to_bytes(self, scaled: Floats, out: NDArray[np.uint8]) -> None:
        bits = scaled.view(np.uint32)
        sign = bits >> 24
        sign &= 0x80
        bits &= 0x7FFFFFFF
        small = scaled + _ROUNDER
        is_small = scaled < _SMALLEST_NORMAL
        odd = bits >> 20
        odd &= 1
        bits += odd
        bits += 0x7FFFF
        bits >>= 20
        bits -= _REBIAS
        np.copyto(bits, small.view(np.uint32) - _ROUNDER.view(np.uint32), where=is_small)
        bits |= sign
        np.copyto(out, bits, casting="unsafe")

    def from_bytes(self, values: NDArray[np.uint8]) -> Floats:
        bits = values.astype(np.uint32)
        sign = bits & 0x80
        sign <<= 24
        bits &= 0x7F
        bits <<= 20
        floats = bits.view(np.float32)
        floats *= np.float32(2.0**120)
        bits |= sign
        return floats
