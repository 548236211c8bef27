"""Fills a Llama model's layers: from a checkpoint's tensors, or drawn from a seed for a model without
weights.

Tensors are taken one at a time, so that the plain form of a weight is gone when the next is read. The
embedding stays where the checkpoint maps it: of a tied one only the packed output projection takes memory of
this process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import xxhash

from ..checkpoints.model_config import ModelConfig
from ..checkpoints.model_files import ModelFiles, Progress
from ..checkpoints.weights import expected_shapes, open_weights
from ..kernels.linear import Linear
from ..kernels.registry import Kernels
from ..proto.kv_layout import UNSHARDED, Sharding
from .kv_pool import TORCH_DTYPES

ReadTensor = Callable[[str], torch.Tensor]
"""A weight's tensor by its Hugging Face name, in the engine's dtype."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """One decoder layer."""

    attention_norm: torch.Tensor
    qkv: Linear
    """Rows of q, then k, then v."""
    output: Linear
    mlp_norm: torch.Tensor
    gate: Linear
    up: Linear
    down: Linear


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaWeights:
    embedding: torch.Tensor
    """[vocab_size, hidden_size]"""
    layers: list[LayerWeights]
    final_norm: torch.Tensor
    lm_head: Linear | None
    """None on all ranks but the first, which samples."""


def load_weights(
    files: ModelFiles,
    kernels: Kernels,
    *,
    dtype: torch.dtype,
    quantised: bool = False,
    progress: Progress | None = None,
    sharding: Sharding = UNSHARDED,
    rank: int = 0,
) -> LlamaWeights:
    """Reads or draws the weights of a rank.

    Args:
        dtype: of the plain weights and of the activations.
        quantised: whether the layers' weights become int8.

    Raises:
        CheckpointError: the files lack a tensor or are damaged.
    """
    config = files.config
    report = progress or (lambda _stage, _share: None)
    read = drawn_tensors(config, files.seed, dtype) if files.is_dummy else _stored_tensors(files, dtype)
    embedding = read("model.embed_tokens.weight")
    if sharding.num_ranks > 1:
        read = rank_tensors(read, config, sharding.tp, rank)
    layers: list[LayerWeights] = []
    for i in range(config.num_layers):
        report("loading weights", i / config.num_layers)
        layers.append(_layer(read, kernels, config, f"model.layers.{i}", quantised))
    head = None
    if rank == 0:
        head = kernels.linear(embedding if config.tie_word_embeddings else read("lm_head.weight"))
    weights = LlamaWeights(
        embedding=embedding,
        layers=layers,
        final_norm=read("model.norm.weight"),
        lm_head=head,
    )
    report("loading weights", 1.0)
    return weights


def _layer(
    read: ReadTensor, kernels: Kernels, config: ModelConfig, name: str, quantised: bool
) -> LayerWeights:
    def linear(group: str, *projections: str, biased: bool) -> Linear:
        def joined(kind: str) -> torch.Tensor:
            parts = [read(f"{name}.{group}.{projection}_proj.{kind}") for projection in projections]
            return parts[0] if len(parts) == 1 else torch.cat(parts)

        bias = joined("bias") if biased else None
        return kernels.linear(joined("weight"), bias, quantised=quantised)

    attention_bias, mlp_bias = config.attention_bias, config.mlp_bias
    return LayerWeights(
        attention_norm=read(f"{name}.input_layernorm.weight"),
        qkv=linear("self_attn", "q", "k", "v", biased=attention_bias),
        output=linear("self_attn", "o", biased=attention_bias),
        mlp_norm=read(f"{name}.post_attention_layernorm.weight"),
        gate=linear("mlp", "gate", biased=mlp_bias),
        up=linear("mlp", "up", biased=mlp_bias),
        down=linear("mlp", "down", biased=mlp_bias),
    )


def rank_tensors(read: ReadTensor, config: ModelConfig, tp: int, rank: int) -> ReadTensor:
    """What one of `tp` ranks keeps of the tensors that `read` gives, with a memory of their own."""
    kv_parts = min(tp, config.num_kv_heads)
    by_rows = {"q_proj": tp, "k_proj": kv_parts, "v_proj": kv_parts, "gate_proj": tp, "up_proj": tp}

    def read_part(name: str) -> torch.Tensor:
        tensor = read(name)
        projection = name.split(".")[-2]
        if projection in by_rows:
            parts = by_rows[projection]
            return tensor.chunk(parts)[rank * parts // tp].clone()
        if projection not in {"o_proj", "down_proj"}:
            return tensor
        if tensor.dim() == 1:  # a bias is added once
            return tensor if rank == 0 else torch.zeros_like(tensor)
        return tensor.chunk(tp, dim=1)[rank].clone(memory_format=torch.contiguous_format)

    return read_part


def _stored_tensors(files: ModelFiles, dtype: torch.dtype) -> ReadTensor:
    source = open_weights(files)

    def read(name: str) -> torch.Tensor:
        raw = source.read(name)
        return torch.frombuffer(raw.data, dtype=TORCH_DTYPES[raw.dtype]).view(raw.shape).to(dtype)

    return read


def drawn_tensors(config: ModelConfig, seed: int, dtype: torch.dtype) -> ReadTensor:
    """Weights of a model that has none: uniform, of a variance that keeps activations near 1, each tensor a
    function of (seed, name) alone and the same on every machine."""
    shapes = expected_shapes(config)

    def read(name: str) -> torch.Tensor:
        shape = shapes[name]
        if name.endswith("norm.weight"):
            return torch.ones(shape, dtype=dtype)
        key = xxhash.xxh3_64_intdigest(name.encode(), seed)
        values = np.random.Generator(np.random.Philox(key=key)).random(shape, np.float32)
        spread = (12.0 / shape[-1]) ** 0.5 if len(shape) == 2 else 0.1  # 12: variance of a uniform number
        return torch.from_numpy((values - np.float32(0.5)) * np.float32(spread)).to(dtype)

    return read
