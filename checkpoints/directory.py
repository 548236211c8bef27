"""A Hugging Face model directory: which files it must have, and what they say about the model."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ..proto.errors import CheckpointError
from .model_config import ModelConfig, parse_hf_config
from .model_files import ModelFiles, ModelKind, fingerprint_of, read_json_object
from .safetensors import SafetensorsFile

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
WEIGHT_INDEX = "model.safetensors.index.json"
SINGLE_SHARD = "model.safetensors"
PATTERNS = (
    CONFIG,
    GENERATION_CONFIG,
    TOKENIZER,
    TOKENIZER_CONFIG,
    CHAT_TEMPLATE,
    WEIGHT_INDEX,
    "model*.safetensors",
)
"""All that is ever read from a model repository."""


def files_from_directory(path: Path, name: str) -> ModelFiles:
    """A directory as a model.

    Raises:
        CheckpointError: files lack (the message names all of them), are malformed, or describe a model that
            is not supported.
    """
    missing = [file for file in (CONFIG, TOKENIZER) if not (path / file).is_file()]
    if not (path / WEIGHT_INDEX).is_file() and not any(path.glob("*.safetensors")):
        missing.append(f"{SINGLE_SHARD} (or {WEIGHT_INDEX} and its shards)")
    if missing:
        raise CheckpointError(f"the model directory {path} lacks {', '.join(missing)}{_hint(path, missing)}")
    config = _load_config(path)
    shards = _find_shards(path)
    headers = [(shard, SafetensorsFile(shard).header_bytes) for shard in shards]
    return ModelFiles(
        name=name,
        kind=ModelKind.DIRECTORY,
        config=config,
        fingerprint=fingerprint_of(config, headers),
        path=path,
        weight_files=shards,
    )


def optional_json(path: Path) -> Mapping[str, object]:
    """The JSON object in a file that need not exist; empty when it does not."""
    return read_json_object(path) if path.is_file() else {}


def special_token(tokenizer_config: Mapping[str, object], key: str) -> str | None:
    """A special token's text, which tokenizer_config.json gives as a string or as an object with
    `content`."""
    value = tokenizer_config.get(key)
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _hint(path: Path, missing: list[str]) -> str:
    present = {file.name for file in path.iterdir()}
    hints = []
    if TOKENIZER in missing and "tokenizer.model" in present:
        hints.append("save tokenizer.json from its tokenizer.model with transformers' fast tokenizer")
    if missing[-1].startswith(SINGLE_SHARD) and any(
        file.endswith((".bin", ".pt", ".pth")) for file in present
    ):
        hints.append("convert its PyTorch weights to safetensors")
    if gguf := sorted(file for file in present if file.endswith(".gguf")):
        hints.append(f"or name the file {path / gguf[0]} itself")
    return "".join(f"; {hint}" for hint in hints)


def _load_config(path: Path) -> ModelConfig:
    """config.json, with every end-of-sequence id that the other files name: a chat model often declares the
    one that ends a turn in generation_config.json or tokenizer_config.json alone."""
    config = parse_hf_config(
        read_json_object(path / CONFIG), optional_json(path / GENERATION_CONFIG), where=str(path / CONFIG)
    )
    token = special_token(optional_json(path / TOKENIZER_CONFIG), "eos_token")
    token_id = None if token is None else _added_token_id(path, token)
    if token_id is None or token_id in config.eos_token_ids:
        return config
    return replace(config, eos_token_ids=(*config.eos_token_ids, token_id))


def _added_token_id(path: Path, token: str) -> int | None:
    added = read_json_object(path / TOKENIZER).get("added_tokens")
    for entry in added if isinstance(added, list) else ():
        if isinstance(entry, dict) and entry.get("content") == token and isinstance(entry.get("id"), int):
            return int(entry["id"])
    return None


def _find_shards(path: Path) -> tuple[Path, ...]:
    """The index decides; without one model.safetensors, else all shards that there are."""
    if (path / WEIGHT_INDEX).is_file():
        weight_map = read_json_object(path / WEIGHT_INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{path / WEIGHT_INDEX} lacks weight_map, the shard of each tensor")
        for name in weight_map.values():
            if not isinstance(name, str) or Path(name).name != name:
                raise CheckpointError(
                    f"{path / WEIGHT_INDEX} names {reprlib.repr(name)}, which is no file beside it"
                )
        names = sorted(set(weight_map.values()))
        if missing := [name for name in names if not (path / name).is_file()]:
            raise CheckpointError(
                f"the model directory {path} lacks {', '.join(missing)}, which {WEIGHT_INDEX} names; "
                "copy or download them again"
            )
        return tuple(path / name for name in names)
    if (path / SINGLE_SHARD).is_file():
        return (path / SINGLE_SHARD,)
    return tuple(sorted(path.glob("*.safetensors")))
