"""What serving adds, out of requests whose times are known."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from diphase.cluster.load.client import LoadClient, Outcome, RequestResult
from diphase.cluster.load.workload import ModelShape, PlannedRequest
from diphase.cluster.planner.profile import ALONE
from diphase.cluster.serving_cost import (
    BATCH,
    BATCH_PROMPT,
    PROMPT_SHARES,
    ROUNDS,
    Served,
    cost_of,
    serve_rounds,
    slowdown_of,
)
from diphase.proto.errors import InternalError
from diphase.router.latency_model import Coefficients
from diphase.router.step_time import StepShape, StepTime

STEPS = Coefficients(0.02, 4e-4, 0.0, 1e-3, 1e-6)
KV_BYTES = 23_040
LENGTHS = (128, 256, 512)


def request(
    prompt: int,
    *,
    outputs: int = 24,
    batch: int = 1,
    step_s: float = 0.0,
    sent: float = 0.0,
    late: float = 0.0,
    around: float = 0.01,
    slower: float = 1.0,
    busy: Sequence[tuple[float, float]] = (),
    slowed: float = 1.0,
) -> RequestResult:
    """One that decodes in a batch of equal ones.

    Args:
        step_s: what a step takes beyond its own time.
        slower: factor on its prompt's time.
        busy: times in which steps take `slowed` times longer.
    """
    result = RequestResult(index=0, due_s=sent - late, sent_s=sent, outcome=Outcome.FINISHED)
    result.prompt_tokens = prompt
    prefill_s = slower * STEPS.step_s(StepShape(prefill_tokens=prompt))
    result.stages = {
        "prefill_ms": prefill_s * 1000.0,
        "handoff_ms": 3.0 + prompt * KV_BYTES / 2e9 * 1000.0,
        "tokenise_ms": 1.0,
        "placement_ms": 2.0,
        "prefill_queue_ms": 1.0,
    }
    result.handoff_bytes = prompt * KV_BYTES
    at = sent + prefill_s + around
    result.token_s = [at]
    at += 0.05  # the hand-off
    for i in range(outputs - 1):
        result.token_s.append(at)
        step = STEPS.step_s(StepShape(decode_batch=batch, decode_context=batch * (prompt + i + 2))) + step_s
        at += step * (slowed if any(begin <= at < end for begin, end in busy) else 1.0)
    return result


def served(*, factor: float = 1.0, slowed: float = 1.0, per_sequence: float = 2e-4) -> Served:
    """A round. Beside the batch prompts take `factor` times longer, and its steps `slowed` times."""
    lone = [request(prompt, step_s=0.0015, late=0.02) for prompt in LENGTHS]
    beside, busy, at = [], [], 1.5
    for prompt in LENGTHS:
        one = request(prompt, outputs=2, sent=at, slower=factor, around=0.03)
        begin = at + 0.004
        busy.append((begin - 1e-9, begin + one.stages["prefill_ms"] / 1000.0))
        beside.append(one)
        at = busy[-1][1] + 0.4
    batch = [
        request(128, outputs=90, batch=8, step_s=0.0015 + 7 * per_sequence, busy=busy, slowed=slowed)
        for _ in range(8)
    ]
    return Served(lone=lone, batch=batch, beside=beside, step_time=STEPS)


def test_costs_are_what_is_beyond_the_steps_own_times() -> None:
    found = cost_of([served(), served(factor=1.2, slowed=1.3), served()])
    assert found.first_token_beside_s == pytest.approx(0.03)
    assert found.first_token_s == pytest.approx(0.01), "not what the client was late"
    assert found.step_s == pytest.approx(0.0013, rel=1e-2)
    assert found.step_per_sequence_s == pytest.approx(2e-4, rel=1e-2)
    assert found.handoff_s == pytest.approx(0.003, rel=1e-3)
    assert found.handoff_bytes_per_s == pytest.approx(2e9, rel=1e-3)


def test_a_cluster_faster_than_the_profile_costs_nothing() -> None:
    one = served(per_sequence=-0.004)
    lone = [request(prompt, step_s=-0.002) for prompt in LENGTHS]
    found = cost_of([Served(lone=lone, batch=one.batch, beside=one.beside, step_time=STEPS)])
    assert (found.step_s, found.step_per_sequence_s) == (0.0, 0.0)


def test_workers_slow_each_other_down_by_what_prompts_and_tokens_take_longer() -> None:
    rounds = [served(factor=1.2, slowed=1.3), served(factor=5.0, slowed=1.3), served(factor=1.2, slowed=1.3)]
    found = slowdown_of(rounds, ALONE).factors
    assert found["prefill"]["decode"] == pytest.approx(1.2), "the median: one round was disturbed"
    assert found["decode"]["prefill"] == pytest.approx(1.3, rel=0.02)
    assert found["prefill"]["prefill"] == found["decode"]["decode"] == 1.0


def test_workers_never_cost_each_other_less_than_bare_engines_do() -> None:
    found = slowdown_of([served(factor=0.8, slowed=0.9)], ALONE).factors
    assert (found["prefill"]["decode"], found["decode"]["prefill"]) == (1.0, 1.0)


def test_without_a_hand_off_there_is_nothing_to_measure() -> None:
    one = served()
    for result in one.lone:
        result.handoff_bytes = 0
    with pytest.raises(InternalError, match="no request of the profile was handed over"):
        cost_of([one])


def test_a_batch_that_never_decodes_together_is_no_measurement() -> None:
    one = served()
    apart = [*one.batch[:7], request(128, batch=8, sent=60.0)]
    with pytest.raises(InternalError, match="did not decode together"):
        cost_of([Served(lone=one.lone, batch=apart, beside=one.beside, step_time=STEPS)])


class _Client(LoadClient):
    """Answers plans with requests of the prompts asked for."""

    def __init__(self, outcome: Outcome = Outcome.FINISHED) -> None:
        self.plans: list[list[PlannedRequest]] = []
        self._outcome = outcome

    async def run_one_by_one(self, plan: Sequence[PlannedRequest]) -> list[RequestResult]:
        return await self.run_open_loop(plan)

    async def run_open_loop(self, plan: Sequence[PlannedRequest]) -> list[RequestResult]:
        self.plans.append(list(plan))
        results = [request(r.input_tokens, outputs=r.output_tokens, sent=r.arrival_s) for r in plan]
        results[-1].outcome = self._outcome
        return results


async def test_rounds_have_their_own_speed_and_the_first_only_warms_up() -> None:
    speeds: list[StepTime] = [STEPS._replace(base=0.02 + 0.001 * i) for i in range(ROUNDS + 2)]
    told = iter(speeds)
    client = _Client()
    model = ModelShape(context_length=4096, vocab_size=1000)
    rounds = await serve_rounds(client, model, lambda: next(told), chunk_budget=512)
    assert [one.step_time for one in rounds] == speeds[2:]
    assert all(len(one.batch) == BATCH and len(one.beside) == len(PROMPT_SHARES) for one in rounds)
    assert [result.prompt_tokens for result in rounds[0].lone] == list(LENGTHS)
    together = client.plans[len(LENGTHS)]
    # The batch decodes for as long as prompts come, the first of them when it has its own computed.
    first, last = together[BATCH], together[-1]
    assert first.arrival_s > BATCH * STEPS.step_s(StepShape(prefill_tokens=BATCH_PROMPT))
    assert together[0].output_tokens * 0.028 > last.arrival_s
    prompts = [tuple(r.prompt) for plan in client.plans for r in plan]
    assert len(set(prompts)) == len(prompts), "nobody finds a prompt of another one cached"


async def test_a_request_that_fails_ends_the_profile() -> None:
    model = ModelShape(context_length=4096, vocab_size=1000)
    with pytest.raises(InternalError, match="a request of the profile ended as failed"):
        await serve_rounds(_Client(Outcome.FAILED), model, lambda: STEPS, chunk_budget=512)
