"""Models with a few wrong bytes: each is read, or refused with a CheckpointError, and nothing hangs."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest
from diphase.checkpoints.chat_template import load_chat_template
from diphase.checkpoints.lookup import resolve
from diphase.checkpoints.tokenizer import load_tokenizer
from diphase.proto.errors import CheckpointError

NUM_TRIALS = 120


def is_read(model: Path) -> bool:
    try:
        files = resolve(str(model))
        load_tokenizer(files)
        load_chat_template(files)
    except CheckpointError:
        return False
    return True


def mutated(rng: random.Random, good: bytes, begin: int, end: int) -> bytes:
    """One to three of the bytes from `begin` to `end` changed."""
    content = bytearray(good)
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(begin, end)
        content[at] = rng.choice([0, 1, 128, 255, rng.randrange(256), content[at] ^ 1 << rng.randrange(8)])
    return bytes(content)


def mutated_json(rng: random.Random, good: bytes) -> bytes:
    """One to three bytes changed, or a value put in another's place."""
    if rng.random() < 0.5:
        return mutated(rng, good, 0, len(good))
    values = list(re.finditer(rb'-?[0-9][0-9.e-]*|"[^"]*"|true|false|\[\]', good))
    chosen = rng.choice(values)
    other = rng.choice(
        [b"-1", b"0", b"1e999", b"NaN", b"9" * 400, b"9" * 5000, b"null", b"true", b'""', b'"\\ud800"', b"{}"]
    )
    return good[: chosen.start()] + other + good[chosen.end() :]


@pytest.mark.parametrize("seed", range(3))
def test_a_damaged_gguf_header_is_no_crash(make: Any, seed: int) -> None:
    path = make.gguf(
        tensors={"rope_freqs.weight": ((16,), 0, b"\0\0\x80\x3f" * 16)}  # sixteen times 1.0
    )
    assert is_read(path)
    rng = random.Random(seed)
    good = path.read_bytes()
    header_bytes = good.rindex(b"rope_freqs.weight") + 40
    outcomes = set()
    for _ in range(NUM_TRIALS):
        path.write_bytes(mutated(rng, good, 0, header_bytes))
        outcomes.add(is_read(path))
    assert outcomes == {True, False}


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer_config.json", "model.safetensors.index.json"]
)
def test_a_damaged_json_file_is_no_crash(make: Any, name: str) -> None:
    path = make.directory(
        config=make.config(
            rope_scaling={
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            }
        ),
        num_shards=2,
        files={
            "generation_config.json": {"eos_token_id": [1, 2], "bos_token_id": 0},
            "tokenizer_config.json": {"eos_token": "<|im_end|>", "chat_template": "{{ bos_token }}"},
        },
    )
    assert is_read(path)
    rng = random.Random(name)
    good = (path / name).read_bytes()
    outcomes = set()
    for _ in range(NUM_TRIALS):
        (path / name).write_bytes(mutated_json(rng, good))
        outcomes.add(is_read(path))
    assert outcomes == {True, False}


def test_a_damaged_safetensors_header_is_no_crash(make: Any) -> None:
    path = make.directory()
    assert is_read(path)
    rng = random.Random(0)
    shard = path / "model.safetensors"
    good = shard.read_bytes()
    header_bytes = 8 + int.from_bytes(good[:8], "little")
    outcomes = set()
    for _ in range(NUM_TRIALS):
        if rng.random() < 0.5:
            shard.write_bytes(mutated(rng, good, 0, header_bytes))
        else:
            header = mutated_json(rng, good[8:header_bytes])
            shard.write_bytes(len(header).to_bytes(8, "little") + header + good[header_bytes:])
        outcomes.add(is_read(path))
    assert False in outcomes
