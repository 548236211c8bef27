"""Admission: hard limits and the SLO's prediction."""

from __future__ import annotations

import pytest
from diphase.proto.errors import Overloaded, SloInfeasible
from diphase.proto.slo import Slo
from diphase.router.admission import Admission
from diphase.router.config import RouterConfig
from diphase.router.placement import Placement


def placement(ttft_ms: float, tpot_ms: float | None, informed: bool = True) -> Placement:
    return Placement(
        prefill=None,
        decode=None,  # type: ignore[arg-type]
        uncached_tokens=1,
        ttft_ms=ttft_ms,
        tpot_ms=tpot_ms,
        slacks=(0.0,),
        informed=informed,
    )


def test_requests_are_limited() -> None:
    admission = Admission(RouterConfig(max_queued_requests=2))
    admission.enter(10, 0.0)
    admission.check_limits(10)
    admission.enter(10, 0.0)
    with pytest.raises(Overloaded, match="max_queued_requests") as caught:
        admission.check_limits(10)
    assert caught.value.retry_after_s is not None
    admission.leave(10, 0.5)
    admission.check_limits(10)


def test_tokens_are_limited_but_one_request_always_fits() -> None:
    admission = Admission(RouterConfig(max_queued_tokens=100))
    admission.check_limits(5000)
    admission.enter(60, 0.0)
    with pytest.raises(Overloaded, match="max_queued_tokens"):
        admission.check_limits(41)
    admission.check_limits(40)


def test_the_retry_after_follows_how_fast_requests_leave() -> None:
    def retry_after_s(interval_s: float) -> float:
        admission = Admission(RouterConfig(max_queued_requests=10))
        now = 0.0
        for _ in range(200):
            admission.enter(1, now)
            now += interval_s
            admission.leave(1, now)
        for _ in range(10):
            admission.enter(1, now)
        with pytest.raises(Overloaded) as caught:
            admission.check_limits(1)
        assert caught.value.retry_after_s is not None
        return caught.value.retry_after_s

    assert retry_after_s(2.0) == pytest.approx(2.0, rel=0.01)
    assert retry_after_s(0.2) == pytest.approx(0.2, rel=0.01)


@pytest.mark.parametrize(("ttft_ms", "tpot_ms"), [(501.0, 10.0), (100.0, 51.0), (900.0, None)])
def test_slo_admission_rejects_what_is_predicted_to_miss(ttft_ms: float, tpot_ms: float | None) -> None:
    admission = Admission(RouterConfig(admission="slo"))
    with pytest.raises(SloInfeasible, match=f"{ttft_ms:.0f} ms") as caught:
        admission.check_placement(placement(ttft_ms, tpot_ms), Slo(ttft_ms=500, tpot_ms=50))
    assert caught.value.retry_after_s == pytest.approx(max(0.05, (ttft_ms - 500) / 1000))


def test_slo_admission_takes_what_fits_and_what_nothing_is_known_about() -> None:
    admission = Admission(RouterConfig(admission="slo"))
    slo = Slo(ttft_ms=500, tpot_ms=50)
    admission.check_placement(placement(499, 49), slo)
    admission.check_placement(placement(499, None), slo)
    admission.check_placement(placement(9000, 900, informed=False), slo)


def test_queue_admission_never_judges() -> None:
    Admission(RouterConfig()).check_placement(placement(9000, 900), Slo(ttft_ms=1, tpot_ms=1))
