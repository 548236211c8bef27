"""What can be set of a prefill worker and its scheduler."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..engine.config import EngineConfig
from ..engine.host_config import HostConfig
from ..kv_transfer.config import KvTransferConfig
from ..proto.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillSchedulerConfig:
    """Which prompts a step computes."""

    chunk_budget: int = 512
    """Most prompt tokens a step; a longer prompt takes several, and more important ones may come between."""
    saturation_tokens: int = 128
    """Further prompts join a step only while it has fewer tokens than this. From here on the processor is
    busy with arithmetic, and a larger batch would only delay the first prompt (DistServe, OSDI 2024, section
    3.1)."""
    max_waiting: int = 4096
    """Most requests that may wait; more are refused."""

    def __post_init__(self) -> None:
        for name in ("chunk_budget", "saturation_tokens", "max_waiting"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} = {getattr(self, name)} must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillWorkerConfig:
    """Everything one prefill worker process is started with."""

    engine: EngineConfig = field(default_factory=EngineConfig)
    scheduler: PrefillSchedulerConfig = field(default_factory=PrefillSchedulerConfig)
    host: HostConfig = field(default_factory=HostConfig)
    kv_transfer: KvTransferConfig = field(default_factory=KvTransferConfig)
