"""What every StepTime keeps, as checks that the tests of each source call."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from diphase.router.step_time import StepShape, StepTime


def check_lines(model: StepTime, batch: int, contexts: Sequence[float]) -> None:
    """step_s() lies on the lines, and where one ends the next goes on."""
    for context in contexts:
        line = model.decode_line(batch, context)
        assert line.until > context
        ends = [context, *([line.until] if line.until < math.inf else [context * 2 + 1])]
        for at in (*ends, sum(ends) / 2):
            step_s = model.step_s(StepShape(decode_batch=batch, decode_context=at))
            assert line.intercept_s + line.slope_s * at == pytest.approx(step_s, rel=1e-9)
        if line.until < math.inf:
            following = model.decode_line(batch, line.until)
            assert following.until > line.until
            met = following.intercept_s + following.slope_s * line.until
            assert line.intercept_s + line.slope_s * line.until == pytest.approx(met, rel=1e-9)


def check_stages(model: StepTime, shape: StepShape) -> None:
    """Each stage takes time, and together they are the step."""
    stages = model.stage_s(shape)
    assert len(stages) == model.stages
    assert min(stages) > 0.0
    assert sum(stages) == pytest.approx(model.step_s(shape), rel=1e-12)


def check_grows(model: StepTime, batch: int, context: float, more: float) -> None:
    """A longer context and a further sequence of the same context never make a decode step faster."""
    step_s = model.step_s(StepShape(decode_batch=batch, decode_context=batch * context))
    longer = model.step_s(StepShape(decode_batch=batch, decode_context=batch * (context + more)))
    larger = model.step_s(StepShape(decode_batch=batch + 1, decode_context=(batch + 1) * context))
    assert 0.0 < step_s <= longer * (1 + 1e-12)
    assert step_s <= larger * (1 + 1e-12)
