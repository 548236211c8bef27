"""An entropy coder for numpy: thousands of range coders ("lanes") advance together, one array operation
at a time.

Each lane is an asymmetric numeral system (Duda, arXiv 1311.2540) with a 31-bit state, 12-bit
probabilities and renormalisation by 16-bit words, all lanes' words interleaved in one stream (Giesen,
arXiv 1402.3392). Symbols come in rows; the columns of a row are spread over the lanes, and each column
names the table that its symbol is coded with. What was coded last comes out first, so rows are encoded
from the last to the first. A decoder trusts nobody: it reads no word that is not there, does the same
work whatever the words are, and notices at the end when the states are not where an encoder starts.
"""

from __future__ import annotations

import struct

import numpy as np
from numpy.typing import NDArray

from ...proto.errors import TransferError

PRECISION = 12
"""Bits of a probability."""
TOTAL = 1 << PRECISION
NUM_SYMBOLS = 256
MAX_TABLES = 255

_START = 1 << 15
"""States are kept in [2^15, 2^31)."""
_LIMIT_SHIFT = 31 - PRECISION
_RANGE = struct.Struct("<BB")
_COUNTS = struct.Struct("<II")
_MAX_LANES = 4096
"""More gain nothing: by then the cost of an array operation is in its elements."""
_LANE_SYMBOLS = 256
"""Symbols that make up for the four bytes that a lane costs."""

Symbols = NDArray[np.uint8]


def num_lanes(num_rows: int, num_columns: int) -> int:
    """How many lanes code so many symbols: as many as cost little, at least one."""
    return max(1, min(num_rows * num_columns // _LANE_SYMBOLS, num_columns, _MAX_LANES))


class Tables:
    """Probabilities of symbols, a table a row: uint32 [num_tables, 256], each row adding up to TOTAL."""

    def __init__(self, frequencies: NDArray[np.uint32]) -> None:
        self.frequencies = frequencies
        self.starts = np.cumsum(frequencies, axis=1, dtype=np.uint32) - frequencies

    @classmethod
    def fit(cls, counts: NDArray[np.int64]) -> Tables:
        """Tables for symbols that were seen so often, [num_tables, 256]. Every symbol between the
        smallest and the largest that a table saw has a place in it."""
        frequencies = np.zeros(counts.shape, np.uint32)
        for table, seen in zip(frequencies, counts, strict=True):
            used = np.flatnonzero(seen)
            low, high = (int(used[0]), int(used[-1])) if len(used) else (0, 0)
            if low == high:  # no symbol may be certain: its probability would not fit twelve bits
                low, high = max(low - 1, 0), min(high + 1, NUM_SYMBOLS - 1)
            part = seen[low : high + 1]
            share = part * (TOTAL - len(part)) // max(int(part.sum()), 1) + 1
            share[int(part.argmax())] += TOTAL - int(share.sum())
            table[low : high + 1] = share
        return cls(frequencies)

    def to_bytes(self) -> bytes:
        """For each table its range of symbols and their frequencies."""
        parts = []
        for table in self.frequencies:
            used = np.flatnonzero(table)
            low, high = int(used[0]), int(used[-1])
            parts += [_RANGE.pack(low, high), table[low : high + 1].astype("<u2").tobytes()]
        return b"".join(parts)

    @classmethod
    def read(cls, data: memoryview, num_tables: int) -> tuple[Tables, int]:
        """Tables and the number of bytes that they took.

        Raises:
            TransferError: the bytes are no tables; the message says which one.
        """
        frequencies = np.zeros((num_tables, NUM_SYMBOLS), np.uint32)
        at = 0
        for number, table in enumerate(frequencies):
            if len(data) - at < _RANGE.size:
                raise TransferError(f"the payload's tables are cut within table {number}")
            low, high = _RANGE.unpack_from(data, at)
            at += _RANGE.size
            size_bytes = 2 * (high - low + 1)
            if high <= low:
                raise TransferError(f"the payload's table {number} ranges from {low} to {high}")
            if len(data) - at < size_bytes:
                raise TransferError(f"the payload's tables are cut within table {number}")
            table[low : high + 1] = np.frombuffer(data, "<u2", high - low + 1, at)
            at += size_bytes
            if not table[low : high + 1].all() or int(table.sum()) != TOTAL:
                raise TransferError(f"the payload's table {number} does not add up to {TOTAL}")
        return cls(frequencies), at


class RowEncoder:
    """Encodes rows of symbols, the last one first."""

    def __init__(self, tables: Tables, num_rows: int, num_columns: int) -> None:
        self._lanes = num_lanes(num_rows, num_columns)
        self._state = np.full(self._lanes, _START, np.uint32)
        # frequency << 16 | start
        self._table = ((tables.frequencies << 16) | tables.starts).reshape(-1)
        # A symbol costs at most PRECISION bits, and less than a word a lane is left over.
        self._words = np.empty(num_rows * num_columns * PRECISION // 16 + self._lanes + 1, np.uint16)
        self._at = len(self._words)
        self._index = np.empty(num_columns, np.intp)
        self._entries = np.empty(num_columns, np.uint32)

    def put(self, symbols: Symbols, bases: NDArray[np.intp]) -> None:
        """Encodes a row, of num_columns symbols at most.

        Args:
            symbols: each must have a place in its table.
            bases: for each, number of the column's table * NUM_SYMBOLS.
        """
        index, entries = self._index[: len(symbols)], self._entries[: len(symbols)]
        np.add(bases, symbols, out=index)
        self._table.take(index, out=entries, mode="clip")
        for begin in reversed(range(0, len(symbols), self._lanes)):
            self._step(entries[begin : begin + self._lanes])

    def _step(self, entries: NDArray[np.uint32]) -> None:
        state = self._state[: len(entries)]
        frequency = entries >> 16
        full = (state >= frequency << _LIMIT_SHIFT).nonzero()[0]
        if len(full):
            moved = state.take(full)
            self._at -= len(full)
            np.copyto(self._words[self._at : self._at + len(full)], moved, casting="unsafe")
            moved >>= 16
            state[full] = moved
        # Exact: correctly rounded quotients of integers below 2^31 round to no larger integer.
        quotient = state.view(np.int32).astype(np.float64)
        quotient /= frequency.view(np.int32)
        # state // frequency * TOTAL + state % frequency + start
        whole = quotient.astype(np.int32).view(np.uint32)
        np.subtract(TOTAL, frequency, out=frequency)
        whole *= frequency
        state += whole
        entries &= 0xFFFF
        state += entries

    def finish(self) -> bytes:
        """The stream: counts of lanes and words, states, words."""
        words = self._words[self._at :]
        return _COUNTS.pack(self._lanes, len(words)) + self._state.tobytes() + words.tobytes()


class RowDecoder:
    """Decodes the rows of one stream, the first one first."""

    def __init__(self, data: memoryview, tables: Tables, num_rows: int, num_columns: int) -> None:
        """
        Raises:
            TransferError: the stream is cut, has something behind it, or is none of these rows.
        """
        if len(data) < _COUNTS.size:
            raise TransferError("the payload's stream is cut within its counts")
        lanes, num_words = _COUNTS.unpack_from(data)
        if lanes != num_lanes(num_rows, num_columns):
            raise TransferError(
                f"the payload's lanes are {lanes} where {num_lanes(num_rows, num_columns)} are expected"
            )
        wanted = _COUNTS.size + 4 * lanes + 2 * num_words
        if len(data) != wanted:
            raise TransferError(f"the payload's stream has {len(data)} bytes where {wanted} are expected")
        self._lanes = lanes
        self._state = np.frombuffer(data, np.uint32, lanes, _COUNTS.size).copy()
        if bool((self._state < _START).any()) or bool((self._state >> 31).any()):
            raise TransferError("the payload's states are out of range")
        self._words = np.frombuffer(data, np.uint16, num_words, _COUNTS.size + 4 * lanes)
        self._at = 0
        self._table = _lookup(tables)
        self._index = np.empty(lanes, np.intp)
        self._entries = np.empty(lanes, np.uint32)

    def take(self, bases: NDArray[np.uint32], out: Symbols) -> None:
        """Decodes a row into `out`.

        Args:
            bases: for each symbol, number of the column's table * TOTAL.

        Raises:
            TransferError: the words have run out.
        """
        for begin in range(0, len(out), self._lanes):
            self._step(bases[begin : begin + self._lanes], out[begin : begin + self._lanes])

    def _step(self, bases: NDArray[np.uint32], out: Symbols) -> None:
        width = len(out)
        state, index, entries = self._state[:width], self._index[:width], self._entries[:width]
        slots = state & (TOTAL - 1)
        slots += bases
        np.copyto(index, slots)
        self._table.take(index, out=entries, mode="clip")
        np.copyto(out, entries, casting="unsafe")  # the lowest byte
        state >>= PRECISION
        state *= entries >> 20
        entries >>= 8
        entries &= TOTAL - 1
        state += entries
        hungry = (state < _START).nonzero()[0]
        if end := len(hungry):
            end += self._at
            if end > len(self._words):
                raise TransferError(f"the payload's words run out after {len(self._words)}")
            fed = state.take(hungry)
            fed <<= 16
            fed |= self._words[self._at : end]
            state[hungry] = fed
            self._at = end

    def finish(self) -> None:
        """
        Raises:
            TransferError: not every word was needed, or the states are not where an encoder starts.
        """
        if self._at != len(self._words):
            raise TransferError(f"the payload has {len(self._words) - self._at} words too many")
        if bool((self._state != _START).any()):
            raise TransferError("the payload's stream is damaged: its states do not end where they started")


def _lookup(tables: Tables) -> NDArray[np.uint32]:
    """For each table and slot: frequency << 20 | (slot - start) << 8 | symbol, [num_tables * TOTAL]."""
    frequencies = tables.frequencies.reshape(-1)
    symbols = np.arange(len(frequencies), dtype=np.uint32) & (NUM_SYMBOLS - 1)
    fixed = (frequencies << 20) | symbols
    fixed -= tables.starts.reshape(-1) << 8
    entries = np.repeat(fixed, frequencies)
    slots = np.arange(len(entries), dtype=np.uint32) & (TOTAL - 1)
    slots <<= 8
    entries += slots
    return entries
