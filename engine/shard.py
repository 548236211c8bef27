"""One rank's part of a model: its pool and its layers. Of a worker of one rank, all of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..checkpoints.model_files import ModelFiles, Progress
from ..kernels.registry import kernels_for
from .config import EngineConfig
from .kv_pool import TORCH_DTYPES, KvPool
from .llama import Llama
from .ranks import Ranks
from .tensor_parallel import layout_of, num_blocks_of, rank_model, sharding_of
from .weights import load_weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    pool: KvPool
    model: Llama


def load_shard(
    files: ModelFiles,
    config: EngineConfig,
    rank: int,
    connect: Callable[[KvPool], Ranks],
    progress: Progress | None = None,
) -> Shard:
    """Takes the pool's memory and loads the weights. Sets torch's thread count.

    Args:
        connect: called with the pool when the weights are loaded; finds the other ranks.

    Raises:
        CheckpointError: the files lack a tensor or are damaged.
        ConfigError: the pool does not fit the machine, or the model cannot be cut so.
        WorkerLost: what `connect` raises.
    """
    torch.set_num_threads(config.threads)
    layout, sharding = layout_of(files, config), sharding_of(files, config)
    num_blocks = num_blocks_of(layout, sharding, config)
    pool = KvPool(sharding.rank_layout(layout, rank), num_blocks)
    kernels = kernels_for("cpu")
    with torch.inference_mode():
        weights = load_weights(
            files,
            kernels,
            dtype=TORCH_DTYPES[config.activation_dtype],
            quantised=config.dtype == "int8",
            progress=progress,
            sharding=sharding,
            rank=rank,
        )
        model = Llama(
            rank_model(files.config, layout, sharding),
            weights,
            kernels,
            pool.tensor,
            # What does not fit the pool could never run.
            min(files.config.context_length, num_blocks * config.block_size),
            ranks=connect(pool),
        )
    return Shard(pool=pool, model=model)
