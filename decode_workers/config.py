"""What can be set of a decode or colocated worker and its scheduler."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..engine.config import EngineConfig
from ..engine.host_config import HostConfig
from ..kv_transfer.config import KvTransferConfig
from ..proto.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeSchedulerConfig:
    """How large the running batch is and how much prompt work goes between its tokens."""

    max_running: int = 64
    """Most sequences in the batch."""
    prefill_budget: int = 128
    """Most prompt tokens a step computes beside the batch's own tokens: of preempted sequences, short or
    mostly cached prompts placed on this worker, and all prompts when no prefill worker is left."""
    max_waiting: int = 4096
    """Most requests that may wait for their prompt to be computed here; more are refused."""
    max_step_context: int = 0
    """Most tokens of context that the decoding sequences of a step have together, which bounds its time;
    those that find no place take turns with the others. 0: no bound."""
    prompts_first: bool = False
    """A step computes prompts alone while there are any, and the batch waits, as vLLM did before chunked
    prefill: quicker first tokens, at the price of stalls of all others."""

    def __post_init__(self) -> None:
        for name in ("max_running", "prefill_budget", "max_waiting"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} = {getattr(self, name)} must be at least 1")
        if self.max_step_context < 0:
            raise ConfigError(f"max_step_context = {self.max_step_context} must be at least 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class ColocatedSchedulerConfig(DecodeSchedulerConfig):
    """A worker that computes prompts and decodes them itself: decodes first, then chunks of prompts up to the
    budget, so that a long prompt never stalls the batch (Sarathi-Serve, OSDI 2024)."""

    prefill_budget: int = 512
    """Most prompt tokens a step computes beside the batch's own tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeWorkerConfig:
    """Everything one decode worker process is started with."""

    engine: EngineConfig = field(default_factory=EngineConfig)
    scheduler: DecodeSchedulerConfig = field(default_factory=DecodeSchedulerConfig)
    """A ColocatedSchedulerConfig makes it a colocated worker, which takes no hand-offs."""
    host: HostConfig = field(default_factory=HostConfig)
    kv_transfer: KvTransferConfig = field(default_factory=KvTransferConfig)

    @property
    def role(self) -> str:
        """decode or colocated."""
        return "colocated" if isinstance(self.scheduler, ColocatedSchedulerConfig) else "decode"
