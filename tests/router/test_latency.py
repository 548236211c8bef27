"""RequestTimes: stages that add up, and verdicts."""

from __future__ import annotations

import pytest
from diphase.proto import worker_pb2 as wpb
from diphase.proto.slo import Slo, Verdict
from diphase.router.clock_offset import ClockOffset
from diphase.router.latency import RequestTimes
from hypothesis import given
from hypothesis import strategies as st

from ..simulation.virtual_loop import run_virtually
from .fakes import fake_cluster, generate, token_request

TIME = st.floats(0.0, 10.0)


def clock(offset: float) -> ClockOffset:
    found = ClockOffset()
    found.observe(0.0, offset, 0.0)
    return found


@given(st.lists(TIME, min_size=6, max_size=6), st.floats(-5.0, 5.0), st.floats(0.0, 10.0))
def test_the_stages_of_ttft_add_up_whatever_the_clocks_say(
    stamps: list[float], offset: float, written: float
) -> None:
    received, tokenised, submitted, now = 0.0, 0.1, 0.2, 10.0
    times = RequestTimes(received, tokenised)
    times.submitted_at = submitted
    prefill = wpb.PrefillTimes(scheduled_at=stamps[0], token_at=stamps[1])
    times.prefilled(prefill, clock(offset), now)
    decode = wpb.DecodeTimes(verified_at=stamps[2], scheduled_at=stamps[3], token_at=stamps[4])
    times.handed_off(decode, clock(-offset), now)
    times.written(1, now + written)
    stages = times.stages()
    parts = (
        stages.tokenise_ms,
        stages.placement_ms,
        stages.prefill_queue_ms,
        stages.prefill_ms,
        stages.delivery_ms,
    )
    assert sum(parts) == pytest.approx(stages.ttft_ms, abs=1e-6)
    assert min(parts) >= 0.0
    second = (stages.handoff_ms, stages.decode_queue_ms, stages.first_decode_ms)
    assert min(second) >= 0.0
    assert sum(second) <= (now - submitted) * 1000.0 + 1e-6


def test_stages_are_what_the_workers_measured() -> None:
    async def main() -> None:
        with fake_cluster(prompt_s=0.05, handoff_s=0.007, step_s=0.02) as cluster:
            async with cluster.router() as router:
                outcome = await generate(router, token_request(range(100), 11))
                stages = outcome.last.stages
                assert stages.prefill_queue_ms == pytest.approx(10.0, abs=0.01)
                assert stages.prefill_ms == pytest.approx(50.0, abs=0.01)
                assert stages.handoff_ms == pytest.approx(7.0, abs=0.01)
                assert stages.decode_queue_ms == pytest.approx(2.0, abs=0.01)
                assert stages.first_decode_ms == pytest.approx(20.0, abs=0.01)
                assert stages.ttft_ms == pytest.approx(60.0, abs=0.01)
                assert stages.tpot_ms == pytest.approx((7 + 2 + 10 * 20) / 10, abs=0.01)
                assert stages.handoff_bytes == 4096
                assert outcome.last.slo == "met"

    run_virtually(main())


def test_one_worker_has_no_hand_off() -> None:
    async def main() -> None:
        with fake_cluster(prefill=0) as cluster:
            async with cluster.router() as router:
                stages = (await generate(router, token_request(range(100), 4))).last.stages
                assert not stages.HasField("handoff_ms")
                assert not stages.HasField("decode_queue_ms")
                assert not stages.HasField("first_decode_ms")

    run_virtually(main())


@pytest.mark.parametrize(
    ("slo", "tokens", "verdict"),
    [
        (Slo(ttft_ms=100, tpot_ms=100), 3, Verdict.MET),
        (Slo(ttft_ms=10, tpot_ms=100), 3, Verdict.TTFT),
        (Slo(ttft_ms=100, tpot_ms=10), 3, Verdict.TPOT),
        (Slo(ttft_ms=10, tpot_ms=10), 3, Verdict.BOTH),
        (Slo(ttft_ms=100, tpot_ms=0.1), 1, Verdict.MET),
    ],
)
def test_the_verdict(slo: Slo, tokens: int, verdict: Verdict) -> None:
    times = RequestTimes(0.0, 0.0)
    for i in range(tokens):
        times.written(1, 0.05 + i * 0.05)
    assert times.verdict(slo) is verdict
    assert times.ttft_ms == pytest.approx(50.0)
