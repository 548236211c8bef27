"""Models without weights, for performance work: a shape, a seed and a byte-level tokenizer.

The weights are drawn by the engine from configuration and seed. The tokenizer encodes any text as its UTF-8
bytes; ids above the bytes are made-up words, so that whatever a random model samples reads as text.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import count, islice, product
from pathlib import Path
from string import ascii_lowercase

import tokenizers
import xxhash
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from ..proto.errors import CheckpointError
from .model_config import ModelConfig, RopeScaling, parse_hf_config
from .model_files import ModelFiles, ModelKind, read_json_object

PREFIX = "dummy:"
BOS, EOS = "<|bos|>", "<|eos|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
_SPECIAL_TOKENS = (BOS, EOS)
_MIN_VOCAB_SIZE = len(_SPECIAL_TOKENS) + 256
_NAME = re.compile(r"(?P<shape>.+?)(?:@(?P<seed>\d{1,9}))?\Z")

PRESETS = {
    "tiny": ModelConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_layers=4,
        num_q_heads=4,
        num_kv_heads=2,
        head_dim=32,
        rms_norm_eps=1e-5,
        context_length=8192,
    ),
    "smollm2-135m": ModelConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_layers=30,
        num_q_heads=9,
        num_kv_heads=3,
        head_dim=64,
        rms_norm_eps=1e-5,
        rope_theta=100000.0,
        context_length=8192,
        tie_word_embeddings=True,
    ),
    "llama-3.2-1b": ModelConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_layers=16,
        num_q_heads=32,
        num_kv_heads=8,
        head_dim=64,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling=RopeScaling(kind="llama3", factor=32.0),
        context_length=131072,
        tie_word_embeddings=True,
    ),
    "llama-3.1-8b": ModelConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=32,
        num_q_heads=32,
        num_kv_heads=8,
        head_dim=128,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling=RopeScaling(kind="llama3", factor=8.0),
        context_length=131072,
    ),
}
"""Shapes of published models, and one for tests."""


def files_from_dummy(name: str) -> ModelFiles:
    """`dummy:PRESET`, `dummy:CONFIG.json` or either with `@SEED` behind it.

    Raises:
        CheckpointError: no such preset or file, or a vocabulary too small for the byte-level tokenizer.
    """
    match = _NAME.match(name.removeprefix(PREFIX))
    if match is None:
        raise CheckpointError(f"{name!r} names no shape; write dummy:PRESET, one of {', '.join(PRESETS)}")
    shape, seed = match["shape"], int(match["seed"] or 0)
    config = PRESETS[shape] if shape in PRESETS else _config_from_file(shape)
    if config.vocab_size < _MIN_VOCAB_SIZE:
        raise CheckpointError(
            f"{name} has a vocabulary of {config.vocab_size}; "
            f"its byte-level tokenizer needs {_MIN_VOCAB_SIZE}"
        )
    config = replace(
        config, bos_token_id=_SPECIAL_TOKENS.index(BOS), eos_token_ids=(_SPECIAL_TOKENS.index(EOS),)
    )
    identity = f"{config.to_json()}|{seed}"
    return ModelFiles(
        name=name,
        kind=ModelKind.DUMMY,
        config=config,
        fingerprint=xxhash.xxh3_64_hexdigest(identity.encode()),
        seed=seed,
    )


def _config_from_file(shape: str) -> ModelConfig:
    path = Path(os.path.expanduser(shape))
    if not path.is_file():
        raise CheckpointError(
            f"{shape!r} is no preset and no file; write {PREFIX}PRESET, one of {', '.join(PRESETS)}, "
            f"or {PREFIX}PATH of a config.json"
        )
    return parse_hf_config(read_json_object(path), where=str(path))


def byte_tokenizer(vocab_size: int) -> tokenizers.Tokenizer:
    """One token a byte behind the two special ones, then words until the vocabulary is full."""
    tokens = [*_SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += islice(_words(), vocab_size - len(tokens))
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in _SPECIAL_TOKENS]
    )
    return tokenizer


def _words() -> Iterator[str]:
    """a, b, … z, aa, ab, …, each with a space before it, as byte-level tokens spell one."""
    for length in count(1):
        for letters in product(ascii_lowercase, repeat=length):
            yield "Ġ" + "".join(letters)
