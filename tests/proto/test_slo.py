"""Objectives and verdicts: the one definition of goodput."""

from __future__ import annotations

import pytest
from diphase.proto import inference_pb2 as pb
from diphase.proto.errors import InvalidRequest
from diphase.proto.slo import Priority, Slo, Verdict, slo_from_proto, slo_to_proto, tpot_ms


@pytest.mark.parametrize(
    ("ttft", "tpot", "verdict"),
    [
        (200.0, 50.0, Verdict.MET),
        (200.1, 50.0, Verdict.TTFT),
        (200.0, 50.1, Verdict.TPOT),
        (201.0, 51.0, Verdict.BOTH),
        (200.0, None, Verdict.MET),
        (201.0, None, Verdict.TTFT),
    ],
)
def test_a_verdict_names_the_objective_that_was_missed(
    ttft: float, tpot: float | None, verdict: Verdict
) -> None:
    assert Slo(ttft_ms=200.0, tpot_ms=50.0).verdict(ttft, tpot) is verdict


def test_tpot_is_the_mean_gap_after_the_first_token() -> None:
    assert tpot_ms(10.0, 10.3, 4) == pytest.approx(100.0)
    assert tpot_ms(10.0, 10.5, 2) == pytest.approx(500.0)


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_below_two_tokens_there_is_no_tpot(num_tokens: int) -> None:
    assert tpot_ms(10.0, 10.0, num_tokens) is None


@pytest.mark.parametrize("name", ["ttft_ms", "tpot_ms"])
@pytest.mark.parametrize("value", [0.0, -1.0, 3_600_001.0, float("nan"), float("inf")])
def test_absurd_objectives_are_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(InvalidRequest, match=rf"slo\.{name} ="):
        slo_from_proto(pb.Slo(**{name: value}), Slo())  # type: ignore[arg-type]


def test_absent_objectives_come_from_the_default() -> None:
    default = Slo(ttft_ms=123.0, tpot_ms=45.0, priority=Priority.INTERACTIVE)
    assert slo_from_proto(pb.Slo(), default) == default
    assert slo_from_proto(pb.Slo(tpot_ms=6.0), default) == Slo(
        ttft_ms=123.0, tpot_ms=6.0, priority=Priority.INTERACTIVE
    )


def test_an_unspecified_priority_is_the_default_and_an_unknown_one_is_refused() -> None:
    default = Slo(priority=Priority.BATCH)
    assert slo_from_proto(pb.Slo(priority=pb.PRIORITY_UNSPECIFIED), default).priority is Priority.BATCH
    with pytest.raises(InvalidRequest, match=r"slo\.priority 9"):
        slo_from_proto(pb.Slo.FromString(bytes([0x18, 9])), default)


@pytest.mark.parametrize("priority", list(Priority))
def test_objectives_survive_the_wire(priority: Priority) -> None:
    slo = Slo(ttft_ms=1500.0, tpot_ms=62.5, priority=priority)
    assert slo_from_proto(slo_to_proto(slo), Slo()) == slo
