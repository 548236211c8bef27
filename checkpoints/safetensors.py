"""Safetensors files: a memory-mapped reader that checks the header, and a writer that streams tensors.

Knows the container and nothing of models. Format: 8 bytes little-endian header length, a JSON header
{name: {dtype, shape, data_offsets}}, then the data without holes.
"""

from __future__ import annotations

import json
import math
import os
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..proto.errors import CheckpointError
from .mapped_file import map_file
from .number_formats import ITEM_BYTES

_DTYPE_OF = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}
_CODE_OF = {dtype: code for code, dtype in _DTYPE_OF.items()}
_MAX_HEADER_BYTES = 100_000_000
_MAX_NUMBER = 2**63 - 1
"""Of a shape or an offset."""
_MAX_DIMENSIONS = 8
_LENGTH_BYTES = 8


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor lies in its file."""

    code: str
    """The file's name of its number format, such as BF16; not every one can be read."""
    shape: tuple[int, ...]
    begin: int
    """Absolute offset, bytes."""
    end: int


class SafetensorsFile:
    """An open shard. What was read from it keeps the mapping alive.

    Raises:
        CheckpointError: the file cannot be opened, is truncated, or its header is malformed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._map = map_file(path)
        length = int.from_bytes(self._map[:_LENGTH_BYTES], "little")
        self.header_bytes = _LENGTH_BYTES + length
        if length > _MAX_HEADER_BYTES or self.header_bytes > len(self._map):
            raise self._malformed(f"its header would be {length} bytes long")
        try:
            header = json.loads(self._map[_LENGTH_BYTES : self.header_bytes])
        except (ValueError, RecursionError) as error:  # of JSON, of UTF-8, of numbers of too many digits
            raise self._malformed(f"its header is no JSON ({error})") from error
        if not isinstance(header, dict):
            raise self._malformed("its header is no JSON object")
        header.pop("__metadata__", None)
        self.entries = {name: self._entry(name, fields) for name, fields in header.items()}
        self._check_contiguous()

    def dtype(self, name: str) -> str:
        """bf16, fp16 or fp32.

        Raises:
            CheckpointError: the tensor has another number format; the message names both.
        """
        code = self.entries[name].code
        if code not in _DTYPE_OF:
            raise CheckpointError(
                f"{self.path}: tensor {name} has dtype {code}, which cannot be read; "
                "use BF16, F16 or F32 weights"
            )
        return _DTYPE_OF[code]

    def read(self, name: str) -> memoryview:
        """The tensor's bytes, row-major, mapped and writable (writes stay in this process)."""
        entry = self.entries[name]
        return memoryview(self._map)[entry.begin : entry.end]

    def _entry(self, name: str, fields: Any) -> TensorEntry:
        try:
            code, shape = fields["dtype"], fields["shape"]
            begin, end = fields["data_offsets"]
            numbers = [*shape, begin, end]
        except (TypeError, KeyError, ValueError) as error:
            raise self._malformed(f"the entry of {name} is {reprlib.repr(fields)}") from error
        if (
            not all(isinstance(n, int) and 0 <= n <= _MAX_NUMBER for n in numbers)
            or len(shape) > _MAX_DIMENSIONS
            or not isinstance(code, str)
            or end < begin
        ):
            raise self._malformed(f"the entry of {name} is {reprlib.repr(fields)}")
        if code in _DTYPE_OF and end - begin != math.prod(shape) * ITEM_BYTES[_DTYPE_OF[code]]:
            raise self._malformed(f"{name} has shape {shape} and {end - begin} bytes of {code}")
        return TensorEntry(code, tuple(shape), self.header_bytes + begin, self.header_bytes + end)

    def _check_contiguous(self) -> None:
        position = self.header_bytes
        for name, entry in sorted(self.entries.items(), key=lambda item: (item[1].begin, item[1].end)):
            if entry.begin != position:
                raise self._malformed(f"the data of {name} begin at {entry.begin}, not at {position}")
            position = entry.end
        if position > len(self._map):
            raise CheckpointError(
                f"{self.path} is truncated: {len(self._map)} bytes of {position}; download it again"
            )
        if position < len(self._map):
            raise self._malformed(f"{len(self._map) - position} bytes follow the last tensor")

    def _malformed(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is not a valid safetensors file: {what}")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a tensor to be written will be."""

    dtype: str
    """bf16, fp16 or fp32."""
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def write_safetensors(
    path: Path,
    specs: Mapping[str, TensorSpec],
    read: Callable[[str], memoryview],
    on_bytes: Callable[[int], None],
) -> None:
    """Writes one file, tensors in the order of `specs`, one in memory at a time, and syncs it to disk.

    Args:
        read: gives the bytes of a tensor of that name, spec.size_bytes long.
        on_bytes: called with the number of data bytes written so far.

    Raises:
        OSError: the disk is full or not writable. ValueError: `read` gave another number of bytes.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, spec in specs.items():
        offsets = [position, position + spec.size_bytes]
        header[name] = {"dtype": _CODE_OF[spec.dtype], "shape": spec.shape, "data_offsets": offsets}
        position = offsets[1]
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % _LENGTH_BYTES)  # the data begin aligned
    written = 0
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(_LENGTH_BYTES, "little") + encoded)
        for name, spec in specs.items():
            data = read(name)
            if data.nbytes != spec.size_bytes:
                raise ValueError(f"{name}: {data.nbytes} bytes given, {spec.size_bytes} announced")
            file.write(data)
            written += data.nbytes
            on_bytes(written)
        file.flush()
        os.fsync(file.fileno())
