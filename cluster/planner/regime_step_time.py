"""Step times by the latency model's terms, in two regimes for each kind of step: what a profile is fitted to.

Prompts alone, decode steps and mixed steps have coefficients of their own, and each kind one set for small
steps and one for large ones. Within a regime a step's time is linear. Nothing is measured or fitted here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...proto.errors import ConfigError
from ...router.latency_model import Coefficients
from ...router.step_time import Line, StepShape


@dataclass(frozen=True, slots=True, kw_only=True)
class Regimes:
    """Of one kind of step. Its size is its prompt tokens, or of a decode step its sequences."""

    small: Coefficients
    """Of steps below `boundary`."""
    large: Coefficients
    """Of all others."""
    boundary: int

    def __post_init__(self) -> None:
        for name in ("small", "large"):
            terms = getattr(self, name)
            if not all(0.0 <= term < float("inf") for term in terms) or not any(terms):
                raise ConfigError(
                    f"{name} = {terms}: coefficients of a step's time must be finite, not negative and not "
                    "all 0"
                )
        if self.boundary < 0:
            raise ConfigError(f"boundary = {self.boundary} must be at least 0")

    def of(self, size: int) -> Coefficients:
        return self.small if size < self.boundary else self.large

    def plus(self, step_s: float, per_sequence_s: float) -> Regimes:
        def longer(terms: Coefficients) -> Coefficients:
            return terms._replace(base=terms.base + step_s, per_sequence=terms.per_sequence + per_sequence_s)

        return replace(self, small=longer(self.small), large=longer(self.large))

    def times(self, factor: float) -> Regimes:
        def scaled(terms: Coefficients) -> Coefficients:
            return Coefficients(*(term * factor for term in terms))

        return replace(self, small=scaled(self.small), large=scaled(self.large))


def size_of(shape: StepShape) -> int:
    """What decides on a step's regime."""
    return shape.prefill_tokens or shape.decode_batch


def kind_of(shape: StepShape) -> str:
    """prefill, decode or mixed."""
    if shape.prefill_tokens and shape.decode_batch:
        return "mixed"
    return "prefill" if shape.prefill_tokens else "decode"


@dataclass(frozen=True, slots=True, kw_only=True)
class RegimeStepTime:
    """Of a worker of one pipeline stage."""

    prefill: Regimes
    """Steps of prompts alone."""
    decode: Regimes
    """Steps without prompts."""
    mixed: Regimes
    """Steps with both."""

    @property
    def stages(self) -> int:
        """See step_time.StepTime."""
        return 1

    def stage_s(self, shape: StepShape) -> tuple[float, ...]:
        """See step_time.StepTime."""
        return (self.step_s(shape),)

    def step_s(self, shape: StepShape) -> float:
        """See step_time.StepTime."""
        if not shape.prefill_tokens:
            terms = self.decode.of(shape.decode_batch)
        else:
            terms = (self.mixed if shape.decode_batch else self.prefill).of(shape.prefill_tokens)
        return terms.step_s(shape)

    def decode_line(self, batch: int, context: float) -> Line:
        """See step_time.StepTime; one line for all contexts of a batch."""
        return self.decode.of(batch).decode_line(batch, context)

    def plus(self, step_s: float, per_sequence_s: float) -> RegimeStepTime:
        """With so many seconds more for each step, and for each sequence that decodes in it."""
        return RegimeStepTime(
            prefill=self.prefill.plus(step_s, per_sequence_s),
            decode=self.decode.plus(step_s, per_sequence_s),
            mixed=self.mixed.plus(step_s, per_sequence_s),
        )

    def slowed(self, prefill: float, decode: float) -> RegimeStepTime:
        """With the times of steps that have prompts, and of those that have none, times a factor each."""
        return RegimeStepTime(
            prefill=self.prefill.times(prefill),
            decode=self.decode.times(decode),
            mixed=self.mixed.times(prefill),
        )
