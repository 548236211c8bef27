"""What each rank of a tensor-parallel worker keeps of a model: arithmetic on shapes. No torch, no processes.

The heads of attention and the width of the MLP are cut into equal parts, in order (Megatron-LM, Shoeybi et
al. 2019): q, k, v, gate and up by rows, o and down by columns, so that a layer needs two sums over the ranks.
A KV head that several ranks need is kept by each of them. Norms and the embedding are everywhere; the output
projection is rank 0's.
"""

from __future__ import annotations

from dataclasses import replace

from ..checkpoints.model_config import ModelConfig
from ..checkpoints.model_files import ModelFiles
from ..proto.errors import ConfigError
from ..proto.kv_layout import KvLayout, Sharding
from .config import EngineConfig


def layout_of(files: ModelFiles, config: EngineConfig) -> KvLayout:
    """Of the whole model's KV, which is the same for every number of ranks."""
    model = files.config
    return KvLayout(
        model=f"{files.name}:{files.fingerprint}:{config.dtype}",
        num_layers=model.num_layers,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        block_size=config.block_size,
        dtype=config.activation_dtype,
    )


def sharding_of(files: ModelFiles, config: EngineConfig) -> Sharding:
    """
    Raises:
        ConfigError: the model cannot be cut into that many parts.
    """
    model, tp = files.config, config.tensor_parallel
    if not _fits(model, tp):
        possible = [str(n) for n in range(1, model.num_q_heads + 1) if _fits(model, n)]
        raise ConfigError(
            f"tensor_parallel = {tp} does not fit {files.name}: it has {model.num_q_heads} query heads, "
            f"{model.num_kv_heads} key-value heads and an MLP of {model.intermediate_size}; "
            f"possible are {', '.join(possible)}"
        )
    return Sharding(tp=tp)


def num_blocks_of(layout: KvLayout, sharding: Sharding, config: EngineConfig) -> int:
    """KV blocks that fit engine.kv_cache_mib, which is what all ranks together take."""
    bytes_a_block = sum(sharding.rank_layout(layout, rank).block_bytes for rank in range(sharding.num_ranks))
    return (config.kv_cache_mib << 20) // bytes_a_block


def rank_model(model: ModelConfig, layout: KvLayout, sharding: Sharding) -> ModelConfig:
    """The shape of the layers that a rank computes, the same for each."""
    return replace(
        model,
        num_q_heads=model.num_q_heads // sharding.tp,
        num_kv_heads=len(sharding.heads(layout, 0)),
        intermediate_size=model.intermediate_size // sharding.tp,
    )


def _fits(model: ModelConfig, tp: int) -> bool:
    heads = model.num_kv_heads
    return not (model.num_q_heads % tp or model.intermediate_size % tp or (heads % tp and tp % heads))
