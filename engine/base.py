"""What a scheduler asks of an engine: run this plan, give back the tokens. No torch.

The real engine (engine.py) and the fake one (fake.py) pass the same conformance suite.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ..proto.errors import DiphaseError
from ..proto.kv_layout import KvLayout, Sharding
from .sequence import Sequence as TokenSequence


@dataclass(slots=True, kw_only=True)
class Chunk:
    """The next `num_tokens` uncomputed tokens of a sequence; their blocks are already in its block_table."""

    sequence: TokenSequence
    num_tokens: int
    samples: bool
    """True when the chunk reaches the sequence's last token: one token is sampled from its logits."""


@dataclass(slots=True, kw_only=True)
class StepPlan:
    """One step: chunks of prompts and single tokens of decoding sequences, mixed as the scheduler likes."""

    chunks: list[Chunk]


@dataclass(slots=True, kw_only=True)
class SampledToken:
    token_id: int
    logprob: float = 0.0
    """Natural log of its probability before penalties and filters; only where asked for."""
    top: list[tuple[int, float]] = field(default_factory=list)
    """The most likely tokens and their log-probabilities, most likely first."""


@dataclass(slots=True, kw_only=True)
class StepResult:
    tokens: list[SampledToken | None]
    """One a chunk of the plan, in its order; None where the chunk does not sample."""
    duration_s: float


LayerHook = Callable[[int], None]
"""Called on the engine's thread with i once the KV of layer i of the running step is in the pool."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLimits:
    """What schedulers and gateways need to know of a model."""

    name: str
    context_length: int
    """Tokens, prompt and completion together."""
    vocab_size: int
    eos_token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class KvRegion:
    """One rank's KV pool."""

    buffer: memoryview
    """Its bytes, writable, num_blocks * sharding.rank_layout(layout, rank).block_bytes long."""
    fd: int | None
    """A memfd of it that another process may map; None where there is none."""


class Engine(Protocol):
    """Computes steps. It owns the KV pool's memory, never its blocks: those are the block manager's."""

    layout: KvLayout
    """Of the whole model."""
    sharding: Sharding
    """How the pool is cut into regions."""
    limits: ModelLimits
    num_blocks: int

    @property
    def kv_regions(self) -> Sequence[KvRegion]:
        """The pools of all ranks in their order; none once closed."""
        ...

    def execute(self, plan: StepPlan, on_layer: LayerHook | None = None) -> StepResult:
        """Runs one step and blocks until it is done. Writes the KV of each chunk's tokens into the blocks of
        its sequence, and samples where asked. Does not change the sequences.

        eos and stop tokens are masked while the token index is below min_tokens.

        Raises:
            WorkerLost: a part of the engine is gone; it can compute no more.
        """
        ...

    def watch(self, lost: Callable[[DiphaseError], None]) -> None:
        """Calls `lost` once, from a thread of its own, when the engine can compute no more though no step
        says so. Asked once."""
        ...

    def close(self) -> None:
        """Frees the pool and ends the watch. Idempotent."""
        ...
