"""What serving adds, out of requests whose times are known."""

from __future__ import annotations

import pytest
from diphase.cluster.load.client import Outcome, RequestResult
from diphase.cluster.serving_cost import Served, cost_of
from diphase.proto.errors import InternalError
from diphase.router.latency_model import Coefficients
from diphase.router.step_time import StepShape

STEPS = Coefficients(0.02, 4e-4, 0.0, 1e-3, 1e-6)
KV_BYTES = 23_040


def request(
    prompt: int,
    *,
    batch: int = 1,
    step_s: float,
    start: float = 0.0,
    late: float = 0.0,
    around: float = 0.01,
) -> RequestResult:
    """One that decodes in a batch of equal ones; `step_s` is what a step takes beyond its own time."""
    result = RequestResult(index=0, due_s=0.0, sent_s=late, outcome=Outcome.FINISHED, prompt_tokens=prompt)
    at = start + late + 0.29 + around
    result.token_s = [at]
    at += 0.05  # the hand-off
    for i in range(30):
        at += STEPS.step_s(StepShape(decode_batch=batch, decode_context=batch * (prompt + i + 1))) + step_s
        result.token_s.append(at)
    result.stages = {"prefill_ms": 290.0, "handoff_ms": 3.0 + prompt * KV_BYTES / 2e9 * 1000.0}
    result.handoff_bytes = prompt * KV_BYTES
    return result


def test_costs_are_what_is_beyond_the_steps_own_times() -> None:
    lone = [request(prompt, step_s=0.0015, late=0.02) for prompt in (128, 256, 512)]
    burst = [request(128, batch=8, step_s=0.0015 + 7 * 2e-4) for _ in range(8)]
    beside = [request(prompt, step_s=0.0, late=0.02, around=0.03) for prompt in (128, 256, 512)]
    found = cost_of(Served(lone=lone, beside=beside, burst=burst), STEPS)
    assert found.first_token_beside_s == pytest.approx(0.03)
    assert found.first_token_s == pytest.approx(0.01), "not what the client was late"
    assert found.step_s == pytest.approx(0.0013, rel=1e-3)
    assert found.step_per_sequence_s == pytest.approx(2e-4, rel=1e-3)
    assert found.handoff_s == pytest.approx(0.003, rel=1e-3)
    assert found.handoff_bytes_per_s == pytest.approx(2e9, rel=1e-3)


def test_a_cluster_faster_than_the_profile_costs_nothing() -> None:
    lone = [request(prompt, step_s=-0.002) for prompt in (128, 256)]
    found = cost_of(Served(lone=lone, beside=lone, burst=[request(128, batch=2, step_s=-0.004)] * 2), STEPS)
    assert (found.step_s, found.step_per_sequence_s) == (0.0, 0.0)


def test_without_a_hand_off_there_is_nothing_to_measure() -> None:
    lone = request(128, step_s=0.0)
    lone.handoff_bytes = 0
    with pytest.raises(InternalError, match="no request of the profile was handed over"):
        cost_of(Served(lone=[lone], beside=[lone], burst=[lone]), STEPS)


def test_a_burst_that_never_decodes_together_is_no_measurement() -> None:
    apart = [request(128, batch=2, step_s=0.0), request(128, batch=2, step_s=0.0, start=60.0)]
    with pytest.raises(InternalError, match="did not decode together"):
        cost_of(Served(lone=[request(128, step_s=0.0)], beside=apart, burst=apart), STEPS)
