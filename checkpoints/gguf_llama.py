"""What a Llama model looks like inside a GGUF file: its metadata keys, its tensor names, its rotary rows.

llama.cpp stores the rows of q and k projections with the two halves of each rotary pair interleaved; here
they are put back to the half-split order of Hugging Face checkpoints, in which all other code thinks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..proto.errors import CheckpointError
from .gguf import GgufFile, GgufValue
from .model_config import ModelConfig, RopeScaling
from .model_files import ModelFiles, ModelKind, fingerprint_of
from .number_formats import ITEM_BYTES, ByteArray, FloatArray

_ROPE_FREQS = "rope_freqs.weight"
_TOP_LEVEL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_NAME = re.compile(r"blk\.(0|[1-9][0-9]{0,3})\.(\w+)\.(weight|bias)\Z")
_EOS_KEYS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")


def files_from_gguf(path: Path, name: str) -> ModelFiles:
    """A .gguf file as a model.

    Raises:
        CheckpointError: the file is damaged, of another architecture, one part of several, or holds tensors
            that a Llama model does not have or that cannot be read.
    """
    gguf = GgufFile(path)
    config = config_from_gguf(gguf)
    return ModelFiles(
        name=name,
        kind=ModelKind.GGUF,
        config=config,
        fingerprint=fingerprint_of(config, [(path, gguf.header_bytes)]),
        path=path,
        weight_files=(path,),
    )


def tensor_names(gguf: GgufFile) -> dict[str, str]:
    """The file's tensor names by their Hugging Face names.

    Raises:
        CheckpointError: a tensor has no place in a Llama model.
    """
    names: dict[str, str] = {}
    for name in gguf.tensors:
        if name == _ROPE_FREQS:  # part of the configuration, see _rope_scaling
            continue
        stem, _, suffix = name.rpartition(".")
        if (match := _LAYER_NAME.match(name)) is not None and match[2] in _IN_LAYER:
            names[f"model.layers.{int(match[1])}.{_IN_LAYER[match[2]]}.{match[3]}"] = name
        elif stem in _TOP_LEVEL and suffix == "weight":
            names[f"{_TOP_LEVEL[stem]}.weight"] = name
        else:
            raise CheckpointError(f"{gguf.path}: tensor {name} has no place in a Llama model")
    return names


def half_split_rows(data: ByteArray, dtype: str, shape: tuple[int, ...], head_dim: int) -> ByteArray:
    """Rows (or a bias) of a q or k projection from llama.cpp's rotary order to the half-split one.

    `data` holds shape [num_heads * head_dim, ...] of `dtype`; a copy is returned.
    """
    row_bytes = math.prod(shape[1:]) * ITEM_BYTES[dtype]
    pairs = data.reshape(-1, head_dim // 2, 2, row_bytes)  # [head, pair, half, byte]
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(-1)


def config_from_gguf(gguf: GgufFile) -> ModelConfig:
    """ModelConfig from the metadata and the tensor table.

    Raises:
        CheckpointError: another architecture, a split file, a mixture of experts, an unknown kind of rope
            scaling, or a value that lacks or has the wrong type.
    """
    keys = _Metadata(gguf.metadata, gguf.path)
    if (architecture := keys.text("general.architecture")) != "llama":
        raise CheckpointError(f"{gguf.path} has the architecture {architecture!r}; only llama is supported")
    if (parts := keys.integer("split.count", 1)) > 1:
        raise CheckpointError(
            f"{gguf.path} is one of {parts} parts; join them with llama.cpp's `llama-gguf-split --merge`"
        )
    if experts := keys.integer("llama.expert_count", 0):
        raise CheckpointError(
            f"{gguf.path} is a mixture of {experts} experts; only dense models are supported"
        )
    embedding = gguf.tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(f"{gguf.path} lacks the tensor token_embd.weight")
    num_q_heads = keys.integer("llama.attention.head_count")
    hidden_size = keys.integer("llama.embedding_length")
    head_dim = keys.integer("llama.attention.key_length", hidden_size // max(num_q_heads, 1))
    if (rotated := keys.integer("llama.rope.dimension_count", head_dim)) != head_dim:
        raise CheckpointError(
            f"{gguf.path} rotates {rotated} of {head_dim} numbers of each head; "
            "only whole heads are supported"
        )
    eos_token_ids = [keys.integer(key) for key in _EOS_KEYS if key in gguf.metadata]
    bos_key = "tokenizer.ggml.bos_token_id"
    config = ModelConfig(
        vocab_size=embedding.shape[0],
        hidden_size=hidden_size,
        intermediate_size=keys.integer("llama.feed_forward_length"),
        num_layers=keys.integer("llama.block_count"),
        num_q_heads=num_q_heads,
        num_kv_heads=keys.integer("llama.attention.head_count_kv", num_q_heads),
        head_dim=head_dim,
        rms_norm_eps=keys.number("llama.attention.layer_norm_rms_epsilon"),
        rope_theta=keys.number("llama.rope.freq_base", 10000.0),
        context_length=keys.integer("llama.context_length"),
        tie_word_embeddings="output.weight" not in gguf.tensors,
        bos_token_id=keys.integer(bos_key) if bos_key in gguf.metadata else None,
        eos_token_ids=tuple(dict.fromkeys(eos_token_ids)),
        attention_bias="blk.0.attn_q.bias" in gguf.tensors,
        mlp_bias="blk.0.ffn_up.bias" in gguf.tensors,
    )
    return replace(config, rope_scaling=_rope_scaling(gguf, keys, config))


def _rope_scaling(gguf: GgufFile, keys: _Metadata, plain: ModelConfig) -> RopeScaling | None:
    """`plain` is the configuration without a scaling, whose numbers have been checked."""
    if _ROPE_FREQS in gguf.tensors:
        return _llama3_scaling(gguf, plain)
    kind = keys.text("llama.rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind == "linear":
        return RopeScaling(kind="linear", factor=keys.number("llama.rope.scaling.factor"))
    raise CheckpointError(f"{gguf.path} has rope scaling {kind!r}; only linear and llama3 are supported")


def _llama3_scaling(gguf: GgufFile, plain: ModelConfig) -> RopeScaling:
    """The llama3 parameters behind a table of frequency divisors: the file has the table alone. All published
    models share low 1, high 4 and an original context of 8192; the table tells whether this one does."""
    table = gguf.tensors[_ROPE_FREQS]
    if table.dtype != "fp32" or table.shape != (plain.head_dim // 2,):
        raise CheckpointError(
            f"{gguf.path}: tensor {_ROPE_FREQS} is {table.dtype} of shape {list(table.shape)}; "
            f"it must be fp32 of shape {[plain.head_dim // 2]}"
        )
    divisors: FloatArray = gguf.read(_ROPE_FREQS).view(np.float32)
    scaling = RopeScaling(kind="llama3", factor=float(str(divisors.max())))
    expected = np.array([f / scaling.scale(f) for f in plain.rope_inv_freq()], np.float32)
    if not np.allclose(divisors, expected, rtol=1e-4):
        raise CheckpointError(
            f"{gguf.path} has rope frequencies that no llama3 scaling with an original context of "
            f"{scaling.original_context} gives; use the Hugging Face checkpoint"
        )
    return scaling


class _Metadata:
    """Typed access to GGUF metadata; a missing or mistyped value is a CheckpointError that names it."""

    def __init__(self, values: Mapping[str, GgufValue], path: Path) -> None:
        self._values = values
        self._path = path

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._values.get(key, default)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        raise self._error(key, value, "a whole number")

    def number(self, key: str, default: float | None = None) -> float:
        value = self._values.get(key, default)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        raise self._error(key, value, "a number")

    def text(self, key: str, default: str | None = None) -> str:
        value = self._values.get(key, default)
        if isinstance(value, str):
            return value
        raise self._error(key, value, "text")

    def _error(self, key: str, value: object, wanted: str) -> CheckpointError:
        if value is None:
            return CheckpointError(f"{self._path} lacks the metadata {key}")
        return CheckpointError(f"{self._path} has {key} = {str(value)[:80]}; it must be {wanted}")
