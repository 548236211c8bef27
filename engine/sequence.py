"""A request as a worker sees it: token ids, the blocks of their KV, how far it is computed. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..proto.ids import HandoffKey
from ..proto.sampling import SamplingParams
from ..proto.slo import Slo


@dataclass(slots=True, eq=False, kw_only=True)
class Sequence:
    """One attempt at one request on one worker. While a step that contains it runs, nobody changes it."""

    key: HandoffKey
    gateway_id: str
    token_ids: list[int]
    """Prompt, then every token generated so far, those of earlier attempts included."""
    num_prompt_tokens: int
    """Of the client's prompt; token index of the completion = position - num_prompt_tokens."""
    params: SamplingParams
    slo: Slo
    arrived_at: float
    """Worker clock, seconds, when the request came to this worker."""
    waited_s: float = 0.0
    """What it had waited before: at its gateway, in earlier attempts, on other workers."""
    block_table: list[int] = field(default_factory=list)
    """Block ids in order of position; block i holds positions i * block_size on."""
    block_hashes: list[bytes] = field(default_factory=list)
    """Content hashes of the leading full blocks (proto/block_hash.py)."""
    num_computed: int = 0
    """Tokens whose KV is in the blocks."""
    num_cached: int = 0
    """Of the prompt tokens, those found in the prefix cache."""

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_uncomputed(self) -> int:
        """Tokens still to be run; 1 while decoding."""
        return len(self.token_ids) - self.num_computed

    @property
    def num_generated(self) -> int:
        """Completion tokens so far, earlier attempts included: the index of the next token."""
        return len(self.token_ids) - self.num_prompt_tokens
