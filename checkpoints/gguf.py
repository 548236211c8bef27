"""A memory-mapped reader of GGUF files, versions 2 and 3, little-endian: metadata and tensors.

Knows the container and nothing of models; gguf_llama.py gives names and shapes their meaning. Every offset
and length is checked against the file's size, so that a truncated or hostile file is an error and no crash.
Format: docs/gguf.md of the ggml project.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..proto.errors import CheckpointError
from .mapped_file import map_file
from .number_formats import GGML_FORMATS, GGML_OTHER_NAMES, ByteArray

GgufValue = int | float | bool | str | list[int] | list[float] | list[bool] | list[str]

_SCALARS: dict[int, tuple[str, str]] = {  # value type -> (struct code, numpy dtype)
    0: ("<B", "<u1"),
    1: ("<b", "<i1"),
    2: ("<H", "<u2"),
    3: ("<h", "<i2"),
    4: ("<I", "<u4"),
    5: ("<i", "<i4"),
    6: ("<f", "<f4"),
    7: ("<?", "?"),
    10: ("<Q", "<u8"),
    11: ("<q", "<i8"),
    12: ("<d", "<f8"),
}
_FLOAT32 = 6
_STRING = 8
_ARRAY = 9
_MAX_DIMENSIONS = 4
_MAX_NAME = 256
"""Characters of a tensor's name; ggml itself allows 64."""
_MAX_ARRAY = 1 << 24
"""Values of one array of the metadata; the longest is a vocabulary."""


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One entry of the tensor table."""

    shape: tuple[int, ...]
    """Row-major: the file's order reversed."""
    ggml_type: int
    begin: int
    """Absolute offset in the file, bytes."""
    size_bytes: int

    @property
    def dtype(self) -> str:
        """What GgufFile.read gives: bf16, fp16 or fp32."""
        return GGML_FORMATS[self.ggml_type].dtype


class GgufFile:
    """An open GGUF file: metadata parsed, tensors mapped. The mapping lives as long as what was read from it.

    Raises:
        CheckpointError: not a GGUF file of version 2 or 3, truncated or damaged, or a tensor of a type that
            cannot be read; the message names tensor and type.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._map = map_file(path)
        self.metadata: dict[str, GgufValue] = {}
        self.tensors: dict[str, GgufTensor] = {}
        try:
            self.header_bytes = self._parse()
        except (struct.error, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path} is truncated or damaged: {error}") from error

    def read(self, name: str) -> ByteArray:
        """The tensor's numbers as bytes of its dtype, row-major, block formats dequantised to fp32;
        writable."""
        tensor = self.tensors[name]
        raw = np.frombuffer(self._map, np.uint8, tensor.size_bytes, tensor.begin)
        form = GGML_FORMATS[tensor.ggml_type]
        return raw if form.expand is None else form.dequantise(raw).view(np.uint8)

    def _parse(self) -> int:
        """Fills metadata and tensors; returns where the tensors' data begin."""
        cursor = _Cursor(self._map)
        if cursor.take(4) != b"GGUF":
            raise CheckpointError(f"{self.path} is not a GGUF file: it does not begin with GGUF")
        version = cursor.scalar("<I")
        if version not in (2, 3):
            raise CheckpointError(
                f"{self.path} is GGUF version {version} or big-endian; "
                "only little-endian 2 and 3 are supported"
            )
        num_tensors, num_values = cursor.scalar("<Q"), cursor.scalar("<Q")
        for _ in range(num_values):
            key = cursor.string()
            self.metadata[key] = cursor.value(cursor.scalar("<I"))
        table = [self._table_entry(cursor) for _ in range(num_tensors)]
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0:
            raise CheckpointError(f"{self.path} has general.alignment = {alignment!r}; it must be positive")
        data_begin = -(-cursor.position // alignment) * alignment
        for name, shape, ggml_type, offset in table:
            self.tensors[name] = self._locate(name, shape, ggml_type, data_begin + offset)
        return data_begin

    def _table_entry(self, cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
        name = cursor.string()
        if len(name) > _MAX_NAME:
            raise CheckpointError(f"{self.path} is damaged: a tensor's name has {len(name)} characters")
        num_dimensions = cursor.scalar("<I")
        if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
            raise CheckpointError(f"{self.path} is damaged: tensor {name} has {num_dimensions} dimensions")
        shape = tuple(cursor.scalar("<Q") for _ in range(num_dimensions))[::-1]
        return name, shape, cursor.scalar("<I"), cursor.scalar("<Q")

    def _locate(self, name: str, shape: tuple[int, ...], ggml_type: int, begin: int) -> GgufTensor:
        form = GGML_FORMATS.get(ggml_type)
        if form is None:
            stored = GGML_OTHER_NAMES.get(ggml_type, f"number {ggml_type}")
            readable = ", ".join(f.name for f in GGML_FORMATS.values())
            raise CheckpointError(
                f"{self.path}: tensor {name} has type {stored}, which cannot be read; "
                f"use a file whose tensors are of {readable}"
            )
        if shape[-1] % form.block_numbers:
            raise CheckpointError(
                f"{self.path} is damaged: rows of {name} have {shape[-1]} numbers, "
                f"no multiple of {form.name}'s {form.block_numbers}"
            )
        size_bytes = math.prod(shape) // form.block_numbers * form.block_bytes
        if begin + size_bytes > len(self._map):
            raise CheckpointError(
                f"{self.path} is truncated: tensor {name} ends at byte {begin + size_bytes} of "
                f"{len(self._map)}; download it again"
            )
        return GgufTensor(shape, ggml_type, begin, size_bytes)


class _Cursor:
    """Reads values one after another; past the end it raises struct.error."""

    def __init__(self, buffer: mmap.mmap) -> None:
        self._buffer = buffer
        self.position = 0

    def take(self, num_bytes: int) -> bytes:
        end = self.position + num_bytes
        if end > len(self._buffer):
            raise struct.error(f"{num_bytes} bytes wanted at {self.position} of {len(self._buffer)}")
        data = self._buffer[self.position : end]
        self.position = end
        return data

    def scalar(self, code: str) -> int:
        """An integer; value() reads the other kinds."""
        (number,) = struct.unpack_from(code, self._buffer, self.position)
        self.position += struct.calcsize(code)
        return int(number)

    def string(self) -> str:
        return self.take(self.scalar("<Q")).decode()

    def value(self, kind: int) -> GgufValue:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self._array()
        if kind not in _SCALARS:
            raise struct.error(f"unknown kind of value {kind} at {self.position}")
        code, _ = _SCALARS[kind]
        (number,) = struct.unpack(code, self.take(struct.calcsize(code)))
        # The decimal that was meant: 1e-05, not 9.999999747378752e-06.
        return float(str(np.float32(number))) if kind == _FLOAT32 else number

    def _array(self) -> list[int] | list[float] | list[bool] | list[str]:
        kind, count = self.scalar("<I"), self.scalar("<Q")
        if count > _MAX_ARRAY:  # may still fit in a large file, and would fill the memory
            raise struct.error(f"an array of {count} values at {self.position}; {_MAX_ARRAY} at most")
        if kind == _STRING:
            return [self.string() for _ in range(count)]
        if kind not in _SCALARS:
            raise struct.error(f"unknown kind of array {kind} at {self.position}")
        dtype = np.dtype(_SCALARS[kind][1])
        values: list[int] | list[float] = np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()
        return values
