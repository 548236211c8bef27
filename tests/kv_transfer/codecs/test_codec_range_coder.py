"""The entropy coder: exact, near the entropy, and unmoved by what others send."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import pytest
from diphase.kv_transfer.codecs.range_coder import (
    NUM_SYMBOLS,
    TOTAL,
    RowDecoder,
    RowEncoder,
    Tables,
    num_lanes,
)
from diphase.proto.errors import TransferError
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

Rows = NDArray[np.uint8]


def counted(rows: Rows, table_of: NDArray[np.intp], num_tables: int) -> NDArray[np.int64]:
    index = (table_of * NUM_SYMBOLS + rows).reshape(-1)
    return np.bincount(index, minlength=num_tables * NUM_SYMBOLS).reshape(num_tables, NUM_SYMBOLS)


def encode(rows: Rows, tables: Tables, table_of: NDArray[np.intp]) -> bytes:
    encoder = RowEncoder(tables, *rows.shape)
    for row in rows[::-1]:
        encoder.put(row, table_of * NUM_SYMBOLS)
    return encoder.finish()


def decode(data: bytes, tables: Tables, table_of: NDArray[np.intp], shape: tuple[int, int]) -> Rows:
    decoder = RowDecoder(memoryview(data), tables, *shape)
    rows = np.empty(shape, np.uint8)
    for row in rows:
        decoder.take((table_of * TOTAL).astype(np.uint32), row)
    decoder.finish()
    return rows


def bell(num_rows: int, num_columns: int, seed: int = 0) -> tuple[Rows, NDArray[np.intp]]:
    """Symbols of three spreads, by column."""
    rng = np.random.default_rng(seed)
    table_of = rng.integers(0, 3, num_columns).astype(np.intp)
    values = rng.laplace(size=(num_rows, num_columns)) * np.array([0.5, 3, 12])[table_of]
    return np.clip(np.rint(values) + 128, 0, 255).astype(np.uint8), table_of


@settings(max_examples=80, deadline=None)
@given(
    num_rows=st.integers(1, 40),
    num_columns=st.integers(1, 300),
    alphabet=st.integers(1, 256),
    seed=st.integers(0, 99),
)
def test_what_went_in_comes_out(num_rows: int, num_columns: int, alphabet: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, alphabet, (num_rows, num_columns)).astype(np.uint8)
    table_of = rng.integers(0, 2, num_columns).astype(np.intp)
    tables = Tables.fit(counted(rows, table_of, 2))
    assert np.array_equal(decode(encode(rows, tables, table_of), tables, table_of, rows.shape), rows)


def test_a_symbol_seen_once_costs_no_more_than_its_twelve_bits() -> None:
    """The buffer for words is sized by this; every symbol here is the least likely of its table."""
    tables = Tables.fit(np.ones((1, NUM_SYMBOLS), np.int64) + (np.arange(NUM_SYMBOLS) == 0) * 10**9)
    rows = np.full((50, 700), 255, np.uint8)
    table_of = np.zeros(700, np.intp)
    assert np.array_equal(decode(encode(rows, tables, table_of), tables, table_of, rows.shape), rows)


def test_the_stream_is_near_the_entropy() -> None:
    rows, table_of = bell(300, 2000)
    counts = counted(rows, table_of, 3)
    share = counts / counts.sum(axis=1, keepdims=True)
    entropy = -(counts * np.log2(np.where(share > 0, share, 1))).sum() / 8
    assert len(encode(rows, Tables.fit(counts), table_of)) < 1.03 * entropy


def test_lanes_are_few_where_they_would_cost() -> None:
    assert num_lanes(1, 1) == 1
    assert num_lanes(16, 11_520) < 11_520
    for num_rows, num_columns in ((1, 100), (17, 11_700), (1000, 11_700), (1000, 100_000)):
        lanes = num_lanes(num_rows, num_columns)
        assert lanes <= num_columns
        assert 4 * lanes <= 4 + num_rows * num_columns / 64


def test_tables_survive_the_wire_and_add_up() -> None:
    rows, table_of = bell(40, 200)
    tables = Tables.fit(counted(rows, table_of, 4))  # the last one saw nothing
    read, used = Tables.read(memoryview(tables.to_bytes()), 4)
    assert used == len(tables.to_bytes())
    assert np.array_equal(read.frequencies, tables.frequencies)
    assert (tables.frequencies.sum(axis=1) == TOTAL).all()
    assert tables.frequencies.max() < TOTAL


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "cut within table 0"),
        (b"\x05", "cut within table 0"),
        (b"\x05\x05\0\x10", "table 0 ranges from 5 to 5"),
        (b"\x06\x05\0\x10", "table 0 ranges from 6 to 5"),
        (b"\x05\x06\0\x08\0", "cut within table 0"),
        (b"\x05\x06\0\x08\0\x09", "does not add up"),
        (b"\x05\x06\0\x10\0\0", "does not add up"),  # a symbol without a place
        (b"\x05\x06\xff\x0f\x01\0\x07", "cut within table 1"),
    ],
)
def test_bytes_that_are_no_tables_are_refused(data: bytes, why: str) -> None:
    with pytest.raises(TransferError, match=why):
        Tables.read(memoryview(data), 2)


def test_damage_anywhere_in_the_stream_is_noticed() -> None:
    """A word decides the rest of its lane, whose state then does not end where it began. Few may pass, which
    the digest of the payload finds."""
    rows, table_of = bell(16, 60)
    tables = Tables.fit(counted(rows, table_of, 3))
    stream = encode(rows, tables, table_of)
    passed = 0
    for at in range(0, len(stream), 3):
        damaged = bytearray(stream)
        damaged[at] ^= 1 << at % 8
        with suppress(TransferError):
            decode(bytes(damaged), tables, table_of, rows.shape)
            passed += 1
    assert passed <= len(stream) / 600


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda data: data[:4], "cut within its counts"),
        (lambda data: b"\xff" + data[1:], "lanes are"),
        (lambda data: data[:-2], "bytes where"),
        (lambda data: data + b"\0\0", "bytes where"),
        (lambda data: data[:4] + b"\xff\xff\xff\xff" + data[8:], "bytes where"),
        (lambda data: data[:8] + b"\0\0\0\0" + data[12:], "states are out of range"),
        (lambda data: data[:8] + b"\xff\xff\xff\xff" + data[12:], "states are out of range"),
        (lambda data: data[:4] + (0).to_bytes(4, "little") + data[8 : 8 + 4 * 23], "run out after 0"),
        (
            lambda data: (
                data[:4]
                + (int.from_bytes(data[4:8], "little") + 1).to_bytes(4, "little")
                + data[8:]
                + b"\0\0"
            ),
            "1 words too many",
        ),
    ],
)
def test_malformed_streams_are_refused_by_name(change: object, why: str) -> None:
    rows, table_of = bell(60, 100)
    tables = Tables.fit(counted(rows, table_of, 3))
    assert num_lanes(60, 100) == 23
    with pytest.raises(TransferError, match=why):
        decode(change(encode(rows, tables, table_of)), tables, table_of, rows.shape)  # type: ignore[operator]
