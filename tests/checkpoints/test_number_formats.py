from __future__ import annotations

import numpy as np
import pytest
from diphase.checkpoints.number_formats import GGML_FORMATS, bf16_from_fp32, fp32_from_bf16
from hypothesis import given
from hypothesis import strategies as st


def nearest_bf16(value: np.float32) -> int:
    """By comparing the two neighbours in double precision; ties to the even pattern."""
    pattern = int(value.view(np.uint32))
    below, above = pattern >> 16, (pattern >> 16) + 1
    exact, low = float(value), float(np.uint32(below << 16).view(np.float32))
    high = float(np.uint32(above << 16).view(np.float32))
    if np.isinf(high) and not np.isinf(low):  # infinity is where the next power of two would be
        high = np.copysign(2.0**128, exact)
    if abs(exact - low) == abs(high - exact):
        return below if below % 2 == 0 else above
    return below if abs(exact - low) < abs(high - exact) else above


@given(st.integers(0, 2**32 - 1))
def test_bf16_is_the_nearest_with_ties_to_even(pattern: int) -> None:
    value = np.uint32(pattern).view(np.float32)
    bits = bf16_from_fp32(np.array([value]))[0]
    if np.isnan(value):
        assert np.isnan(fp32_from_bf16(np.array([bits]))[0])
        assert bits >> 15 == pattern >> 31
    elif np.isinf(value):
        assert bits == pattern >> 16
    else:
        assert bits == nearest_bf16(value)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (0x3F808000, 0x3F80),  # a tie above an even pattern
        (0x3F818000, 0x3F82),  # a tie above an odd one
        (0x3F808001, 0x3F81),
        (0x7F7FFFFF, 0x7F80),  # the largest finite number rounds to infinity
        (0x80000000, 0x8000),
        (0xFFFFFFFF, 0xFFFF),  # a NaN whose payload would carry into the sign
        (0x7F800001, 0x7FC0),  # a NaN whose payload lies in the bits that go
    ],
)
def test_bf16_of_edge_patterns(pattern: int, expected: int) -> None:
    assert bf16_from_fp32(np.array([pattern], np.uint32).view(np.float32))[0] == expected


def test_bf16_of_arrays_longer_than_a_chunk_keeps_shape_and_order() -> None:
    values = np.random.default_rng(0).standard_normal((3, 200_001)).astype(np.float32)
    bits = bf16_from_fp32(values)
    assert bits.shape == values.shape
    for i, j in ((0, 0), (1, 99), (2, 200_000), (1, 130_000)):
        assert bits[i, j] == nearest_bf16(values[i, j])


def by_definition(kind: str, block: bytes) -> list[float]:
    """One block, number by number, as ggml-quants.c dequantises it."""
    scale = float(np.frombuffer(block[:2], np.float16)[0])
    if kind == "Q8_0":
        return [float(np.float32(scale * q)) for q in np.frombuffer(block[2:], np.int8).tolist()]
    low = float(np.frombuffer(block[2:4], np.float16)[0]) if kind == "Q4_1" else 0.0
    quants = block[4:] if kind == "Q4_1" else block[2:]
    nibbles = [byte % 16 for byte in quants] + [byte // 16 for byte in quants]
    shift = 8 if kind == "Q4_0" else 0
    return [float(np.float32(np.float32(scale * (q - shift)) + np.float32(low))) for q in nibbles]


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_block_formats_dequantise_as_defined(kind: str) -> None:
    form = next(f for f in GGML_FORMATS.values() if f.name == kind)
    num_blocks = 9000  # more than one chunk
    rng = np.random.default_rng(1)
    blocks = rng.integers(0, 256, (num_blocks, form.block_bytes), np.uint8)
    header = 4 if kind == "Q4_1" else 2
    blocks[:, :header] = rng.standard_normal((num_blocks, header // 2)).astype(np.float16).view(np.uint8)
    values = form.dequantise(blocks.reshape(-1)).reshape(num_blocks, 32)
    for i in (0, 1, 4095, 8191, 8192, num_blocks - 1):
        np.testing.assert_array_equal(
            values[i], np.array(by_definition(kind, blocks[i].tobytes()), np.float32)
        )


def test_plain_formats_have_nothing_to_dequantise() -> None:
    with pytest.raises(ValueError, match="F16 is not a block format"):
        GGML_FORMATS[1].dequantise(np.zeros(4, np.uint8))
