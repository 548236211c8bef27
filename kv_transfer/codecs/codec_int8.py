"""KV as eight-bit integers with one scale for each token and head, K and V apart: half of bf16, a quarter of
fp32."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .codec_floats import Floats
from .codec_rows import ScaledRowsCodec


class Int8Codec(ScaledRowsCodec):
    """Symmetric: the largest magnitude of a row becomes 127."""

    name = "int8"
    codec_id = 1
    largest = 127.0

    def to_bytes(self, scaled: Floats, out: NDArray[np.uint8]) -> None:
        np.rint(scaled, out=scaled)
        np.copyto(out.view(np.int8), scaled, casting="unsafe")

    def from_bytes(self, values: NDArray[np.uint8]) -> Floats:
        return values.view(np.int8).astype(np.float32)
