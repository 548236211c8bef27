"""Step times in DistServe's form: fixed coefficients, two regimes of decode batches, pipeline stages.

Coefficients come from who measured them (the planner's profile and tables); nothing is fitted or read here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ..proto.errors import ConfigError
from .step_time import Line, StepShape


class PrefillTerms(NamedTuple):
    """Seconds: of a prefill, one of its tokens, a squared token of a prompt's length."""

    base: float
    per_token: float
    per_squared_length: float


class DecodeTerms(NamedTuple):
    """Seconds: of a decode step, a token of context, a sequence."""

    base: float
    per_context: float
    per_sequence: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TwoRegimeStepTime:
    """DistServe's form (OSDI 2024, appendix A, and its released simulator). On each of `stages` equal parts:

        prefill: (base + per_token * tokens + per_squared_length * sum of length²) / stages + prefill_hop_s
        decode:  (base + per_context * context + per_sequence * batch) / stages

    with one set of decode terms for batches below `large_batch` and another from there on. The first stage
    adds `overhead_s`, and `overhead_per_token_s` for each prompt token and each token of context that was
    there before the step. A mixed step has the larger of the two bases and the other terms of both.
    """

    prefill: PrefillTerms
    small: DecodeTerms
    large: DecodeTerms
    large_batch: int
    """Sequences from which `large` holds."""
    stages: int = 1
    prefill_hop_s: float = 0.0
    overhead_s: float = 0.0
    overhead_per_token_s: float = 0.0

    def __post_init__(self) -> None:
        if self.stages < 1:
            raise ConfigError(f"a worker has {self.stages} pipeline stages; it needs at least 1")

    def stage_s(self, shape: StepShape) -> tuple[float, ...]:
        """See step_time.StepTime."""
        batch, decode_context = shape.decode_batch, shape.decode_context
        base = work = hop = 0.0
        if shape.prefill_tokens:
            base, per_token, per_squared_length = self.prefill
            work = per_token * shape.prefill_tokens + per_squared_length * 2.0 * shape.prefill_context
            hop = self.prefill_hop_s
        if batch:
            terms = self._decode(batch)
            base = max(base, terms.base)
            work += terms.per_context * decode_context + terms.per_sequence * batch
        part = (base + work) / self.stages + hop
        there_before = shape.prefill_tokens + decode_context - batch
        first = part + self.overhead_s + self.overhead_per_token_s * there_before
        return (first,) + (part,) * (self.stages - 1)

    def step_s(self, shape: StepShape) -> float:
        """See step_time.StepTime."""
        return sum(self.stage_s(shape))

    def decode_line(self, batch: int, context: float) -> Line:
        """See step_time.StepTime; one line for all contexts of a batch."""
        terms = self._decode(batch)
        per_sequence = terms.per_sequence - self.overhead_per_token_s
        return Line(
            terms.base + self.overhead_s + per_sequence * batch,
            terms.per_context + self.overhead_per_token_s,
            float("inf"),
        )

    def _decode(self, batch: int) -> DecodeTerms:
        return self.small if batch < self.large_batch else self.large
