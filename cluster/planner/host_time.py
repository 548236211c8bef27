"""What an engine does between two steps while its GPUs wait: it schedules, makes the next batch's inputs,
takes the sampled tokens and sends them. Step times of GPUs alone, a roofline's or a table's of kernels, lack
it. Knows no engine."""

from __future__ import annotations

from typing import NamedTuple

from ...router.step_time import Line, StepShape, StepTime


class Host(NamedTuple):
    """Seconds: of a step, and of each sequence that it decodes."""

    step_s: float = 0.0
    sequence_s: float = 0.0


SERVING = Host(step_s=4e-4, sequence_s=3.8e-5)
"""Of a serving engine: the least median error of TPOT over 132 measured serving points of Llama-3.1-70B in
fp8 on B200, with TensorRT-LLM and vLLM (`benchmarks/measured_points.py --calibrate`). No other model,
hardware or engine had a part in it."""


class WithHost:
    """Step times with the host's; with several stages the first one waits for it."""

    def __init__(self, steps: StepTime, host: Host = SERVING) -> None:
        self._steps, self._host = steps, host

    @property
    def stages(self) -> int:
        """See step_time.StepTime."""
        return self._steps.stages

    def stage_s(self, shape: StepShape) -> tuple[float, ...]:
        """See step_time.StepTime."""
        first, *others = self._steps.stage_s(shape)
        return (first + self._host_s(shape.decode_batch), *others)

    def step_s(self, shape: StepShape) -> float:
        """See step_time.StepTime."""
        return self._steps.step_s(shape) + self._host_s(shape.decode_batch)

    def decode_line(self, batch: int, context: float) -> Line:
        """See step_time.StepTime."""
        line = self._steps.decode_line(batch, context)
        return line._replace(intercept_s=line.intercept_s + self._host_s(batch))

    def _host_s(self, batch: int) -> float:
        return self._host.step_s + self._host.sequence_s * batch
