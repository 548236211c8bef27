"""How long a step takes, as the router's placement and the planner's simulator ask: one interface, whoever
knows the answer.

Live, router/latency_model.py fits it to the steps that workers report; the planner has further sources
(cluster/planner). All times are seconds.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol


class StepShape(NamedTuple):
    """What a step works on; the fields of a StepSample without its times."""

    prefill_tokens: int = 0
    prefill_context: float = 0.0
    """Sum over the prompt chunks of tokens * (context before + tokens / 2): half the squared length of a
    prompt that is computed whole."""
    decode_batch: int = 0
    decode_context: float = 0.0
    """Sum of the contexts of the decoding sequences, each with the token that it computes."""


class Line(NamedTuple):
    """A decode step's time while its batch stays: `intercept_s + slope_s * context` up to `until` (tokens of
    context of the whole batch; may be infinite)."""

    intercept_s: float
    slope_s: float
    until: float


class StepTime(Protocol):
    """Of one worker, with its parallelism and hardware."""

    def step_s(self, shape: StepShape) -> float:
        """All stages of one step together."""
        ...

    def decode_line(self, batch: int, context: float) -> Line:
        """The line on which steps of `batch` decoding sequences and no prompt lie from `context` on; on it,
        step_s() gives the same up to rounding of floats."""
        ...
