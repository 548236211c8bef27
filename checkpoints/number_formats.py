"""How numbers are stored in checkpoints: bfloat16 rounding and GGUF's block formats, vectorised in numpy.

Knows bytes and arrays, no files and no models. Formats: ggml-common.h and ggml-quants.c of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
ByteArray = NDArray[np.uint8]

ITEM_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
"""Bytes of one number of each dtype that RawTensor may have."""

_QUANT_GROUP = 32
"""Weights that share one scale, in every block format here."""
_CHUNK_BLOCKS = 8192
"""Blocks dequantised at once: the 1 MiB of fp32 they make stays in the cache."""
_CHUNK_NUMBERS = 1 << 18


def bf16_from_fp32(values: FloatArray) -> NDArray[np.uint16]:
    """The nearest bfloat16 bit patterns, ties to even, NaN stays NaN; same shape."""
    flat = np.ascontiguousarray(values).reshape(-1)
    result = np.empty(flat.shape, np.uint16)
    for start in range(0, flat.size, _CHUNK_NUMBERS):
        part = flat[start : start + _CHUNK_NUMBERS]
        bits = part.view(np.uint32)
        rounded = (bits >> 16) & 1
        rounded += bits
        rounded += 0x7FFF
        rounded >>= 16
        nan = np.isnan(part)
        if nan.any():
            rounded[nan] = (
                bits[nan] >> 16
            ) | 0x0040  # the quiet bit: truncation alone could make it infinite
        result[start : start + part.size] = rounded
    return result.reshape(values.shape)


def fp32_from_bf16(bits: NDArray[np.uint16]) -> FloatArray:
    """Exact; same shape."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """A GGML tensor type that can be read."""

    name: str
    block_numbers: int
    block_bytes: int
    dtype: str
    """What it is read as: bf16, fp16 or fp32."""
    expand: Callable[[ByteArray, FloatArray], None] | None = None
    """Fills fp32 [num_blocks, block_numbers] from uint8 [num_blocks, block_bytes]; None when stored
    plainly."""

    def dequantise(self, data: ByteArray) -> FloatArray:
        """fp32 [num_blocks * block_numbers] from the bytes of whole blocks; only for block formats."""
        if self.expand is None:
            raise ValueError(f"{self.name} is not a block format")
        blocks = data.reshape(-1, self.block_bytes)
        values = np.empty((len(blocks), self.block_numbers), np.float32)
        for start in range(0, len(blocks), _CHUNK_BLOCKS):
            stop = start + _CHUNK_BLOCKS
            self.expand(blocks[start:stop], values[start:stop])
        return values.reshape(-1)


def _half(blocks: ByteArray, offset: int) -> FloatArray:
    """The fp16 at a byte offset of each block, as fp32 [num_blocks, 1]."""
    return np.ascontiguousarray(blocks[:, offset : offset + 2]).view(np.float16).astype(np.float32)


def _nibbles(quants: ByteArray, values: FloatArray) -> None:
    """Low nibbles are the first half of a block, high nibbles the second."""
    values[:, : _QUANT_GROUP // 2] = quants & 0x0F
    values[:, _QUANT_GROUP // 2 :] = quants >> 4


def _expand_q4_0(blocks: ByteArray, values: FloatArray) -> None:
    _nibbles(blocks[:, 2:], values)
    values -= 8.0
    values *= _half(blocks, 0)


def _expand_q4_1(blocks: ByteArray, values: FloatArray) -> None:
    _nibbles(blocks[:, 4:], values)
    values *= _half(blocks, 0)
    values += _half(blocks, 2)


def _expand_q8_0(blocks: ByteArray, values: FloatArray) -> None:
    values[:] = blocks[:, 2:].view(np.int8)
    values *= _half(blocks, 0)


GGML_FORMATS = {
    0: BlockFormat("F32", 1, 4, "fp32"),
    1: BlockFormat("F16", 1, 2, "fp16"),
    2: BlockFormat("Q4_0", _QUANT_GROUP, 18, "fp32", _expand_q4_0),
    3: BlockFormat("Q4_1", _QUANT_GROUP, 20, "fp32", _expand_q4_1),
    8: BlockFormat("Q8_0", _QUANT_GROUP, 34, "fp32", _expand_q8_0),
    30: BlockFormat("BF16", 1, 2, "bf16"),
}
"""By the type number in a GGUF file."""

GGML_OTHER_NAMES = {
    6: "Q5_0",
    7: "Q5_1",
    9: "Q8_1",
    10: "Q2_K",
    11: "Q3_K",
    12: "Q4_K",
    13: "Q5_K",
    14: "Q6_K",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
}
"""Types that exist but cannot be read here; for error messages."""
