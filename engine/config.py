"""What an engine is configured with. No torch: the cluster's configuration is composed of this."""

from __future__ import annotations

from dataclasses import dataclass

from ..proto.errors import ConfigError

DTYPES = ("bf16", "fp32", "int8")
BLOCK_SIZES = (8, 16, 32, 64)
MOST_RANKS = 256
MOST_KV_CACHE_MIB = 1 << 24


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """One engine: the sections [model] and [engine]."""

    model: str = "smollm2"
    """Name of the model: `smollm2`, `dummy:PRESET[@SEED]`, a directory, a .gguf file or a Hub repository."""
    dtype: str = "bf16"
    """Of weights and activations: bf16; fp32 (exact, slow); int8 (weights of the layers only, with bf16
    activations, embedding, output projection and KV)."""
    block_size: int = 16
    """Tokens a KV block."""
    kv_cache_mib: int = 512
    """Memory of the KV pool, MiB; taken at start. A pool of workers may have its own."""
    threads: int = 1
    """Threads that one step computes with. More than the worker's own cores make everything slower."""
    rank_timeout_s: float = 10.0
    """Longest that a rank of a worker with tensor parallelism waits for another in a step, seconds; then the
    worker ends."""
    tensor_parallel: int = 1
    """Ranks, each a process with its part of the model and of the KV."""
    cores: tuple[int, ...] = ()
    """CPU cores of all ranks together, dealt out evenly in order; empty leaves them to the system."""
    batch_invariant: bool = False
    """Whether a token's bits are kept apart from its company in decode steps, prefills and mixed steps alike,
    so that preemption and recovery change nothing either; a decode step of bf16 takes about a fifth longer.
    Without it they are kept apart within each kind of step."""

    def __post_init__(self) -> None:
        if not self.model:
            raise ConfigError("model.name is empty; name a model, for example smollm2")
        if self.dtype not in DTYPES:
            raise ConfigError(f"model.dtype = {self.dtype!r} is unknown; use one of {', '.join(DTYPES)}")
        if self.block_size not in BLOCK_SIZES:
            raise ConfigError(
                f"engine.block_size = {self.block_size} is not possible; "
                f"use one of {', '.join(map(str, BLOCK_SIZES))}"
            )
        if not 1 <= self.kv_cache_mib <= MOST_KV_CACHE_MIB:
            raise ConfigError(
                f"engine.kv_cache_mib = {self.kv_cache_mib} is out of range; use 1 to {MOST_KV_CACHE_MIB}"
            )
        if not 1 <= self.threads <= 1024:
            raise ConfigError(f"engine.threads = {self.threads} is out of range; use 1 to 1024")

        if not 1 <= self.tensor_parallel <= MOST_RANKS:
            raise ConfigError(
                f"tensor_parallel = {self.tensor_parallel} is out of range; use 1 to {MOST_RANKS}"
            )
        if len(self.cores) % self.tensor_parallel:
            raise ConfigError(f"{len(self.cores)} cores cannot be dealt out to {self.tensor_parallel} ranks")
        if not 0.0 < self.rank_timeout_s <= 86_400.0:
            raise ConfigError(
                f"engine.rank_timeout_s = {self.rank_timeout_s} is out of range; use up to 86400"
            )

    def cores_of(self, rank: int) -> tuple[int, ...]:
        share = len(self.cores) // self.tensor_parallel
        return self.cores[rank * share : (rank + 1) * share]

    @property
    def activation_dtype(self) -> str:
        """Of activations and KV: bf16 or fp32."""
        return "fp32" if self.dtype == "fp32" else "bf16"
