"""What may shrink the wire: the codec interface, what a codec is told about the bytes, and the codecs
there are.

A codec turns KV in canonical order, `[block][layer][k|v][kv_head][slot][head_dim]` with every layer and head
in question, into a payload and back. A payload says what it holds, so that one that was cut, damaged or made
for something else is refused by name. Codecs know no transports, no slots and no peers; they run on any
thread, keep no state between calls and let go of the interpreter lock in their array operations. No torch.
"""

from __future__ import annotations

import importlib
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from ...proto.errors import ConfigError, TransferError
from ...proto.kv_layout import ITEM_BYTES, KvLayout

RAW = "raw"

CODECS: Mapping[str, str] = {
    RAW: "diphase.kv_transfer.codecs.codec_raw:RawCodec",
    "fp8": "diphase.kv_transfer.codecs.codec_fp8:Fp8Codec",
    "int8": "diphase.kv_transfer.codecs.codec_int8:Int8Codec",
    "cachegen-3": "diphase.kv_transfer.codecs.codec_cachegen:fine",
    "cachegen-2": "diphase.kv_transfer.codecs.codec_cachegen:medium",
    "cachegen-1": "diphase.kv_transfer.codecs.codec_cachegen:coarse",
}
"""Name to "module:what makes one", least change of the KV first."""

_HEAD = struct.Struct("<4sBBBxHHHHIII")
HEAD_BYTES = _HEAD.size
_MAGIC = b"dpkv"
_DTYPE_CODES = {name: code for code, name in enumerate(ITEM_BYTES)}


@dataclass(frozen=True, slots=True, kw_only=True)
class KvSpec:
    """What a codec is told about the bytes: some layers of some whole blocks."""

    layout: KvLayout
    num_blocks: int
    num_tokens: int
    """Tokens that the blocks hold; slots of the last block beyond them hold nothing of worth."""
    first_layer: int
    num_layers: int

    def __post_init__(self) -> None:
        """
        Raises:
            TransferError: the numbers do not fit each other or the layout.
        """
        last = self.layout.num_layers
        if not (
            self.first_layer >= 0 and self.num_layers >= 1 and self.first_layer + self.num_layers <= last
        ):
            raise TransferError(
                f"first_layer {self.first_layer} and num_layers {self.num_layers} are not within the "
                f"{last} layers of the model"
            )
        if self.num_blocks < 1 or self.layout.num_blocks_for(self.num_tokens) != self.num_blocks:
            raise TransferError(
                f"num_tokens {self.num_tokens} does not fill num_blocks {self.num_blocks} of "
                f"{self.layout.block_size} slots"
            )

    @property
    def shape(self) -> tuple[int, int, int, int, int, int]:
        """(num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim)"""
        layout = self.layout
        return (
            self.num_blocks,
            self.num_layers,
            2,
            layout.num_kv_heads,
            layout.block_size,
            layout.head_dim,
        )

    @property
    def item_bytes(self) -> int:
        return ITEM_BYTES[self.layout.dtype]

    @property
    def size_bytes(self) -> int:
        """Of the KV itself."""
        return self.num_blocks * self.num_layers * self.layout.layer_bytes

    @property
    def num_rows(self) -> int:
        """Vectors of head_dim elements."""
        return self.size_bytes // (self.layout.head_dim * self.item_bytes)


class Codec(Protocol):
    """One way to write KV. Any thread may call it."""

    @property
    def name(self) -> str:
        """Its key in CODECS."""
        ...

    @property
    def lossless(self) -> bool:
        """Whether decode gives back every byte, those of unused slots included."""
        ...

    def max_bytes(self, spec: KvSpec) -> int:
        """No payload of this spec is longer."""
        ...

    def encode(self, kv: memoryview, spec: KvSpec, out: memoryview) -> int:
        """Writes the payload of `kv` (spec.size_bytes, contiguous, canonical order) to the start of `out`,
        which holds at least max_bytes(spec). Returns its length in bytes.

        Raises:
            TransferError: a buffer has the wrong size.
        """
        ...

    def decode(self, data: memoryview, spec: KvSpec, out: memoryview) -> None:
        """Writes the KV of a payload to `out` (spec.size_bytes, contiguous, canonical order). The payload may
        come from anyone: work and memory are bounded by the spec. After an error `out` may hold anything.

        Raises:
            TransferError: the payload is malformed or not of this spec; the message names the field.
        """
        ...


def load_codec(name: str) -> Codec:
    """The codec that CODECS names.

    Raises:
        ConfigError: there is none of this name.
    """
    if name not in CODECS:
        raise ConfigError(f"codec {name!r} is unknown; use one of {', '.join(CODECS)}")
    module, _, attribute = CODECS[name].partition(":")
    make: Callable[[], Codec] = getattr(importlib.import_module(module), attribute)
    return make()


def load_codecs(names: Iterable[str]) -> dict[str, Codec]:
    """Codecs by name, in the order of CODECS, `raw` among them whether named or not.

    Raises:
        ConfigError: a name is unknown.
    """
    wanted = {RAW, *names}
    if unknown := sorted(wanted - CODECS.keys()):
        raise ConfigError(f"codec {unknown[0]!r} is unknown; use one of {', '.join(CODECS)}")
    return {name: load_codec(name) for name in CODECS if name in wanted}


def check_sizes(kv: memoryview, spec: KvSpec, out: memoryview, max_bytes: int) -> None:
    """For encode().

    Raises:
        TransferError: `kv` is not of the spec's size or `out` may be too small.
    """
    if kv.nbytes != spec.size_bytes:
        raise TransferError(f"kv has {kv.nbytes} bytes and its spec {spec.size_bytes}")
    if out.nbytes < max_bytes:
        raise TransferError(f"a payload may take {max_bytes} bytes and out has {out.nbytes}")


def write_head(out: memoryview, spec: KvSpec, codec_id: int, version: int) -> None:
    """The head of a payload: who wrote it and of what."""
    layout = spec.layout
    _HEAD.pack_into(
        out,
        0,
        _MAGIC,
        codec_id,
        version,
        _DTYPE_CODES[layout.dtype],
        layout.num_kv_heads,
        layout.head_dim,
        spec.first_layer,
        spec.num_layers,
        layout.block_size,
        spec.num_blocks,
        spec.num_tokens,
    )


def check_head(data: memoryview, spec: KvSpec, codec_id: int, version: int, out: memoryview) -> None:
    """For decode(): that the payload was written by this codec for this spec, and `out` takes it.

    Raises:
        TransferError: it was not; the message names the first field that differs.
    """
    if out.nbytes != spec.size_bytes:
        raise TransferError(f"out has {out.nbytes} bytes and its spec {spec.size_bytes}")
    if data.nbytes < HEAD_BYTES:
        raise TransferError(f"the payload's head is cut: {data.nbytes} of {HEAD_BYTES} bytes")
    wanted = bytearray(HEAD_BYTES)
    write_head(memoryview(wanted), spec, codec_id, version)
    names = (
        "magic", "codec", "version", "dtype", "num_kv_heads", "head_dim", "first_layer", "num_layers",
        "block_size", "num_blocks", "num_tokens",
    )  # fmt: skip
    for name, found, expected in zip(names, _HEAD.unpack_from(data), _HEAD.unpack(wanted), strict=True):
        if found != expected:
            raise TransferError(f"the payload's {name} is {found!r} where {expected!r} is expected")
