"""What a model's name resolved to: its configuration, its identity and the files it is read from.

Plain data that can be pickled and sent to workers. It knows no file format: directory.py, gguf_llama.py and
dummy.py make it, weights.py, tokenizer.py and chat_template.py read from it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import xxhash

from ..proto.errors import CheckpointError
from .model_config import ModelConfig

Progress = Callable[[str, float], None]
"""(what is being done, share that is done from 0 to 1); called from the resolving thread."""

_NUM_SAMPLES = 16
_SAMPLE_BYTES = 4096


class ModelKind(StrEnum):
    DIRECTORY = "directory"
    """config.json, tokenizer.json and safetensors shards."""
    GGUF = "gguf"
    DUMMY = "dummy"
    """Random weights that the engine draws; a byte-level tokenizer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFiles:
    """A model that is complete: everything needed to open its weights, tokenizer and chat template."""

    name: str
    """As it was asked for."""
    kind: ModelKind
    config: ModelConfig
    fingerprint: str
    """16 hexadecimal digits over configuration and weights; of a dummy over configuration and seed."""
    path: Path | None = None
    """The directory or the .gguf file; None for a dummy."""
    weight_files: tuple[Path, ...] = ()
    """Safetensors shards, or the one .gguf file."""
    seed: int = 0
    """Of a dummy's weights."""

    @property
    def is_dummy(self) -> bool:
        """Whether the weights are to be drawn from `config` and `seed` instead of read."""
        return self.kind is ModelKind.DUMMY


def fingerprint_of(config: ModelConfig, weights: Sequence[tuple[Path, int]]) -> str:
    """Content identity of a model without reading all of it: 16 hexadecimal digits over the configuration
    and, for each (file, header length in bytes), the size, the header and 16 samples of 4 KiB.

    The samples tell fine-tunes of one architecture apart, whose sizes and headers are equal.
    """
    digest = xxhash.xxh3_64(config.to_json().encode())
    for path, header_bytes in weights:
        size = path.stat().st_size
        digest.update(f"|{size}|".encode())
        with path.open("rb") as file:
            digest.update(file.read(header_bytes))
            for i in range(_NUM_SAMPLES):
                file.seek(header_bytes + (size - header_bytes) * i // _NUM_SAMPLES)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def read_text(path: Path) -> str:
    """A file's text.

    Raises:
        CheckpointError: the file cannot be read or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read as text: {error}") from error


def read_json_object(path: Path) -> Mapping[str, object]:
    """The JSON object in a file.

    Raises:
        CheckpointError: the file cannot be read, is not JSON, or holds something else than an object.
    """
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:  # also of numbers of too many digits
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value
