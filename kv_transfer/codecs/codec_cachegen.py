"""A codec after CacheGen (Liu et al., SIGCOMM'24): deltas against the first token of each group of ten,
steps by thirds of the layers and three levels of quality, then entropy coding. Four to seven times
smaller than bf16.

A payload is head, body head, step of each head (fp32), kinds, tables, escapes, stream. A *kind* is a
class of channels: whether they are deltas, and the octave of their mean magnitude. Each has a table for
its deltas and one for its anchors; the stream's first row names the kind of each channel, further rows
are tokens: shifts of the heads, then values of the channels. KV that does not become smaller is stored as
it is. Knows what a payload is; delta_groups.py knows numbers and range_coder.py bits.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from ...proto.errors import TransferError
from .codec import HEAD_BYTES, KvSpec, check_head, check_sizes, write_head
from .codec_floats import TILE_ITEMS, Bits, Floats, as_bits
from .delta_groups import NUM_SHIFTS, Steps, Symbols, anchor_rows, quantise, restore, sample_rows
from .range_coder import NUM_SYMBOLS, TOTAL, RowDecoder, RowEncoder, Tables

_CODEC_ID = 3
_VERSION = 1
_BODY = struct.Struct("<BBxxII")
_CODED, _STORED = 0, 1

_KIND_TABLE, _SHIFT_TABLE, _FIRST_TABLE = 0, 1, 2
_MAX_KINDS = 32

Thirds = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Layers that are quantised together."""

    layers: slice
    heads: slice
    channels: slice


class CacheGenCodec:
    """Implements Codec."""

    lossless = False

    def __init__(self, name: str, k_shares: Thirds, v_shares: Thirds) -> None:
        """`k_shares`, `v_shares`: quantisation steps in the first, middle and last third of the layers,
        as shares of the spread of a head's values. A decoder needs to know nothing of them."""
        self.name = name
        self._shares = np.array([k_shares, v_shares], np.float32)

    def max_bytes(self, spec: KvSpec) -> int:
        return HEAD_BYTES + _BODY.size + spec.size_bytes

    def encode(self, kv: memoryview, spec: KvSpec, out: memoryview) -> int:
        check_sizes(kv, spec, out, self.max_bytes(spec))
        write_head(out, spec, _CODEC_ID, _VERSION)
        with np.errstate(all="ignore"):
            parts = self._encode(as_bits(kv, spec.layout.dtype).reshape(spec.shape), spec)
        if sum(map(len, parts)) > _BODY.size + spec.size_bytes:
            parts = [_BODY.pack(_STORED, 0, 0, 0), kv.cast("B")]
        at = HEAD_BYTES
        for part in parts:
            out[at : at + len(part)] = part
            at += len(part)
        return at

    def _encode(self, kv: Bits, spec: KvSpec) -> list[bytes | memoryview]:
        """The parts of a payload behind its head."""
        num_heads, num_channels = _num_heads(spec), _num_heads(spec) * spec.layout.head_dim
        rows = np.empty((spec.num_tokens, num_heads + num_channels), np.uint8)
        shifts, values = rows[:, :num_heads], rows[:, num_heads:]
        steps = np.empty(num_heads, np.float32)
        predicted = np.empty((num_heads, spec.layout.head_dim), np.bool_)
        escapes: list[Bits] = []
        shares = self._shares_of_heads(spec)
        for chunk in _chunks(spec):
            bits = _by_tokens(kv[:, chunk.layers], spec.num_tokens)
            symbols = Symbols(values=values[:, chunk.channels], shifts=shifts[:, chunk.heads])
            quantised, outside = quantise(bits, spec.layout.dtype, shares[chunk.heads], symbols)
            steps[chunk.heads], predicted[chunk.heads] = quantised.steps, quantised.predicted
            escapes += outside
        kinds, kind_of = _kinds(values, predicted)
        tables = _fit(kinds, kind_of, shifts, values)
        encoder = RowEncoder(tables, spec.num_tokens + 1, num_heads + num_channels)
        anchor_bases, delta_bases = _bases(kind_of, len(kinds), num_heads, NUM_SYMBOLS)
        for row, is_anchor in zip(rows[::-1], anchor_rows(spec.num_tokens)[::-1], strict=True):
            encoder.put(row, anchor_bases if is_anchor else delta_bases)
        encoder.put(kind_of, np.full(num_channels, _KIND_TABLE, np.intp))
        table_bytes = tables.to_bytes()
        return [
            _BODY.pack(_CODED, len(kinds), len(table_bytes), sum(map(len, escapes))),
            steps.tobytes(),
            kinds.tobytes(),
            table_bytes,
            b"".join(piece.tobytes() for piece in escapes),
            encoder.finish(),
        ]

    def _shares_of_heads(self, spec: KvSpec) -> Floats:
        """[num_heads]"""
        layers = np.arange(spec.first_layer, spec.first_layer + spec.num_layers)
        thirds = 3 * layers // spec.layout.num_layers
        shares = self._shares[:, thirds].T  # [num_layers, 2]
        return np.repeat(shares.reshape(-1), spec.layout.num_kv_heads)

    def decode(self, data: memoryview, spec: KvSpec, out: memoryview) -> None:
        check_head(data, spec, _CODEC_ID, _VERSION, out)
        reader = _Reader(data.cast("B")[HEAD_BYTES:])
        mode, num_kinds, table_bytes, num_escapes = _BODY.unpack(reader.take(_BODY.size, "body head"))
        if mode == _STORED:
            out.cast("B")[:] = reader.take(spec.size_bytes, "stored KV")
            reader.finish()
            return
        if mode != _CODED or not 1 <= num_kinds <= _MAX_KINDS:
            raise TransferError(f"the payload's mode is {mode} and its number of kinds {num_kinds}")
        num_heads, num_channels = _num_heads(spec), _num_heads(spec) * spec.layout.head_dim
        steps = np.frombuffer(reader.take(4 * num_heads, "steps"), np.float32)
        kinds = np.frombuffer(reader.take(num_kinds, "kinds"), np.uint8)
        tables, used = Tables.read(reader.take(table_bytes, "tables"), _FIRST_TABLE + 2 * num_kinds)
        if used != table_bytes:
            raise TransferError(f"the payload's tables take {used} bytes of {table_bytes}")
        escapes = as_bits(reader.take(num_escapes * spec.item_bytes, "escapes"), spec.layout.dtype)
        rows = np.empty((spec.num_tokens, num_heads + num_channels), np.uint8)
        kind_of = _decode_rows(reader.rest(), tables, num_kinds, num_heads, rows)
        predicted = (kinds[kind_of] & 1).astype(np.bool_).reshape(num_heads, -1)
        into = as_bits(out, spec.layout.dtype).reshape(spec.shape)
        found = 0
        with np.errstate(all="ignore"):
            for chunk in _chunks(spec):
                symbols = Symbols(
                    values=rows[:, num_heads:][:, chunk.channels], shifts=rows[:, :num_heads][:, chunk.heads]
                )
                chunk_steps = Steps(steps=steps[chunk.heads], predicted=predicted[chunk.heads])
                found += _restore(symbols, chunk_steps, escapes[found:], spec, into[:, chunk.layers])
        if found != num_escapes:
            raise TransferError(f"the payload's escapes are {num_escapes} where {found} are expected")


coarse = partial(CacheGenCodec, "cachegen-1", (0.60, 0.50, 0.40), (1.20, 1.00, 0.80))
medium = partial(CacheGenCodec, "cachegen-2", (0.30, 0.25, 0.20), (0.60, 0.50, 0.40))
fine = partial(CacheGenCodec, "cachegen-3", (0.15, 0.125, 0.10), (0.30, 0.25, 0.20))
"""The levels; benchmarks/codecs.py measures what they save and spoil."""


class _Reader:
    """Takes a payload apart."""

    def __init__(self, data: memoryview) -> None:
        self._data = data

    def take(self, num_bytes: int, field: str) -> memoryview:
        """
        Raises:
            TransferError: the payload ends before.
        """
        if len(self._data) < num_bytes:
            raise TransferError(f"the payload's {field} is cut: {len(self._data)} of {num_bytes} bytes")
        taken, self._data = self._data[:num_bytes], self._data[num_bytes:]
        return taken

    def rest(self) -> memoryview:
        taken, self._data = self._data, self._data[:0]
        return taken

    def finish(self) -> None:
        if len(self._data):
            raise TransferError(f"the payload has {len(self._data)} bytes too many")


def _num_heads(spec: KvSpec) -> int:
    """K and V heads of all layers in question."""
    return spec.num_layers * 2 * spec.layout.num_kv_heads


def _chunks(spec: KvSpec) -> Iterator[_Chunk]:
    """As many layers at a time as fill a tile of the conversions."""
    heads = 2 * spec.layout.num_kv_heads
    channels = heads * spec.layout.head_dim
    step = max(1, TILE_ITEMS // (channels * spec.num_tokens))
    for first in range(0, spec.num_layers, step):
        end = min(first + step, spec.num_layers)
        yield _Chunk(
            slice(first, end), slice(first * heads, end * heads), slice(first * channels, end * channels)
        )


def _by_tokens(kv: Bits, num_tokens: int) -> Bits:
    """[num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim] as [num_tokens, num_heads,
    head_dim]."""
    tokens = np.ascontiguousarray(kv.transpose(0, 4, 1, 2, 3, 5))
    return tokens.reshape(kv.shape[0] * kv.shape[4], -1, kv.shape[5])[:num_tokens]


def _restore(symbols: Symbols, steps: Steps, escapes: Bits, spec: KvSpec, out: Bits) -> int:
    """Into layers of the canonical order; unused slots become 0. Returns the number of escapes among the
    symbols."""
    num_blocks, num_layers, _, num_kv_heads, block_size, head_dim = out.shape
    tokens = np.zeros((num_blocks * block_size, num_layers * 2 * num_kv_heads, head_dim), out.dtype)
    found = restore(symbols, steps, escapes, spec.layout.dtype, tokens[: spec.num_tokens])
    blocks = tokens.reshape(num_blocks, block_size, num_layers, 2, num_kv_heads, head_dim)
    np.copyto(out, blocks.transpose(0, 2, 3, 4, 1, 5))
    return found


def _kinds(
    values: NDArray[np.uint8], predicted: NDArray[np.bool_]
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The kinds that occur, and for each channel the number of its own among them."""
    rows = sample_rows(len(values))
    if len(rows) > 1:
        rows = rows[~anchor_rows(len(values))[rows]]
    magnitude = np.abs(values[rows].astype(np.int16) - 128).mean(axis=0, dtype=np.float32)
    octave = np.clip(np.rint(np.log2(magnitude + 0.05)) + 4, 0, _MAX_KINDS // 2 - 1).astype(np.uint8)
    kinds, kind_of = np.unique(octave * 2 + predicted.reshape(-1), return_inverse=True)
    return kinds.astype(np.uint8), kind_of.astype(np.uint8)


def _fit(
    kinds: NDArray[np.uint8],
    kind_of: NDArray[np.uint8],
    shifts: NDArray[np.uint8],
    values: NDArray[np.uint8],
) -> Tables:
    """Tables for everything in the stream. Frequencies are those of a sample; which symbols a table has a
    place for comes from all."""
    num_kinds = len(kinds)
    counts = np.zeros((_FIRST_TABLE + 2 * num_kinds, NUM_SYMBOLS), np.int64)
    counts[_KIND_TABLE] = np.bincount(kind_of, minlength=NUM_SYMBOLS)
    counts[_SHIFT_TABLE] = np.bincount(shifts.reshape(-1), minlength=NUM_SYMBOLS)
    anchors = anchor_rows(len(values))
    sampled = np.zeros(len(values), np.bool_)
    sampled[sample_rows(len(values))] = True
    for first, chosen in ((_FIRST_TABLE, ~anchors), (_FIRST_TABLE + num_kinds, anchors)):
        if not chosen.any():
            continue
        index = kind_of * np.intp(NUM_SYMBOLS) + values[chosen & sampled]
        part = counts[first : first + num_kinds]
        part += np.bincount(index.reshape(-1), minlength=part.size).reshape(part.shape)
        of_kind = values[chosen]
        np.add.at(part, (kind_of, of_kind.min(axis=0)), 1)
        np.add.at(part, (kind_of, of_kind.max(axis=0)), 1)
    return Tables.fit(counts)


def _bases(
    kind_of: NDArray[np.uint8], num_kinds: int, num_heads: int, width: int
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Where the tables of a row's columns begin, each `width` long: for rows of anchors and of deltas."""
    deltas = np.concatenate(
        [np.full(num_heads, _SHIFT_TABLE, np.intp), kind_of.astype(np.intp) + _FIRST_TABLE]
    )
    anchors = deltas.copy()
    anchors[num_heads:] += num_kinds
    return anchors * width, deltas * width


def _decode_rows(
    data: memoryview, tables: Tables, num_kinds: int, num_heads: int, rows: NDArray[np.uint8]
) -> NDArray[np.uint8]:
    """Fills `rows` from the stream; returns the kind of each channel.

    Raises:
        TransferError: the stream is damaged.
    """
    num_tokens, num_columns = rows.shape
    decoder = RowDecoder(data, tables, num_tokens + 1, num_columns)
    kind_of = np.empty(num_columns - num_heads, np.uint8)
    decoder.take(np.full(len(kind_of), _KIND_TABLE * TOTAL, np.uint32), kind_of)
    if int(kind_of.max()) >= num_kinds:
        raise TransferError(f"the payload's kind {int(kind_of.max())} is none of its {num_kinds}")
    bases = [each.astype(np.uint32) for each in _bases(kind_of, num_kinds, num_heads, TOTAL)]
    for row, is_anchor in zip(rows, anchor_rows(num_tokens), strict=True):
        decoder.take(bases[0 if is_anchor else 1], row)
    decoder.finish()
    if int(rows[:, :num_heads].max()) >= NUM_SHIFTS:
        raise TransferError(f"the payload's shift {int(rows[:, :num_heads].max())} is out of range")
    return kind_of
