"""How long a step takes, as the router's placement and the planner's simulator ask: one interface, whoever
knows the answer.

Live, router/latency_model.py fits it to the steps that workers report; the planner has further sources
(cluster/planner). All times are seconds.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from ..proto.worker_pb2 import StepSample


class StepShape(NamedTuple):
    """What a step works on; the fields of a StepSample without its times."""

    prefill_tokens: int = 0
    prefill_context: float = 0.0
    """Sum over the prompt chunks of tokens * (context before + tokens / 2): half the squared length of a
    prompt that is computed whole."""
    decode_batch: int = 0
    decode_context: float = 0.0
    """Sum of the contexts of the decoding sequences, each with the token that it computes."""

    @classmethod
    def of(cls, sample: StepSample) -> StepShape:
        """What a worker reports of a step."""
        return cls(sample.prefill_tokens, sample.prefill_context, sample.decode_batch, sample.decode_context)


class Line(NamedTuple):
    """A decode step's time while its batch stays: `intercept_s + slope_s * context` from the context asked
    for up to `until` (tokens of context of the whole batch; may be infinite), where the next line begins;
    they meet there but for rounding."""

    intercept_s: float
    slope_s: float
    until: float


class StepTime(Protocol):
    """Of one worker, with its parallelism and hardware. Steps without work are not asked for."""

    @property
    def stages(self) -> int:
        """Pipeline stages, each of which can work on another step."""
        ...

    def stage_s(self, shape: StepShape) -> tuple[float, ...]:
        """One step's time on each pipeline stage, first to last."""
        ...

    def step_s(self, shape: StepShape) -> float:
        """All stages of one step together: the sum of stage_s()."""
        ...

    def decode_line(self, batch: int, context: float) -> Line:
        """The line on which step_s() of `batch` decoding sequences and no prompt lies from `context` on, up
        to rounding of floats; `until` is above `context`. It serves workers of one stage: with several, steps
        overlap and stage_s() says how."""
        ...
