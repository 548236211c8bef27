"""Sampling parameters: defaults, ranges, and the way over the wire."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any, cast

import pytest
from diphase.proto import inference_pb2 as pb
from diphase.proto.errors import InvalidRequest
from diphase.proto.sampling import SamplingParams, sampling_from_proto, sampling_to_proto
from hypothesis import given

from .legal_params import sampling_params


@given(sampling_params())
def test_the_wire_changes_nothing(params: SamplingParams) -> None:
    message = pb.Sampling.FromString(sampling_to_proto(params).SerializeToString())
    assert sampling_from_proto(message) == params


def test_absent_fields_take_the_documented_defaults() -> None:
    params = sampling_from_proto(pb.Sampling())
    assert params == SamplingParams()
    assert params.max_tokens == 256
    assert params.greedy
    assert params.logprobs is None


@pytest.mark.parametrize("field", ["stop", "stop_token_ids"])
def test_lists_are_counted_before_they_are_read(field: str) -> None:
    class Counted(list[int]):
        def __iter__(self) -> Any:
            raise AssertionError("millions may be in it")

    message = SimpleNamespace(HasField=lambda _: False, stop=(), stop_token_ids=(), ignore_eos=False)
    setattr(message, field, Counted(range(100)))
    with pytest.raises(InvalidRequest, match=rf"sampling\.{field} has 100 .*; send at most"):
        sampling_from_proto(cast(pb.Sampling, message))


def test_a_zero_that_was_sent_is_not_an_absent_field() -> None:
    assert sampling_from_proto(pb.Sampling(logprobs=0)).logprobs == 0
    with pytest.raises(InvalidRequest, match=r"sampling\.max_tokens = 0 .* \[1,"):
        sampling_from_proto(pb.Sampling(max_tokens=0))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("min_tokens", 257),
        ("temperature", -0.5),
        ("temperature", 101.0),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", 1e-40),
        ("temperature", 0.0009),
        ("top_k", 2**31),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_p", float("nan")),
        ("min_p", -0.25),
        ("min_p", 1.5),
        ("min_p", float("nan")),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 1e-40),
        ("repetition_penalty", 0.09),
        ("repetition_penalty", float("nan")),
        ("repetition_penalty", float("inf")),
        ("repetition_penalty", 11.0),
        ("presence_penalty", -2.5),
        ("presence_penalty", 2.5),
        ("presence_penalty", float("nan")),
        ("frequency_penalty", float("-inf")),
        ("frequency_penalty", float("nan")),
        ("logprobs", 21),
    ],
)
def test_values_out_of_range_are_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(InvalidRequest, match=rf"sampling\.{field} = .* out of range"):
        sampling_from_proto(pb.Sampling(**{field: value}))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "value", "advice"),
    [
        ("temperature", 1e-40, "use [0.001, 100.0], or 0 for greedy"),
        ("repetition_penalty", 1e-40, "use [0.1, 10.0]; 1 is off"),
        ("top_p", 0.0, "use (0.0, 1.0]"),
    ],
)
def test_a_refusal_says_what_to_use(field: str, value: float, advice: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        sampling_from_proto(pb.Sampling(**{field: value}))  # type: ignore[arg-type]
    assert refused.value.message.endswith(advice)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.0),
        ("temperature", 0.001),
        ("temperature", 100.0),
        ("top_p", 1e-40),
        ("min_p", 1e-40),
        ("repetition_penalty", 0.1),
        ("repetition_penalty", 10.0),
        ("presence_penalty", 1e-40),
    ],
)
def test_the_ends_of_the_ranges_are_allowed_as_the_wire_rounds_them(field: str, value: float) -> None:
    message = pb.Sampling.FromString(pb.Sampling(**{field: value}).SerializeToString())  # type: ignore[arg-type]
    assert getattr(sampling_from_proto(message), field) == pytest.approx(value, rel=1e-6, abs=1e-44)


@pytest.mark.parametrize(
    "message",
    [
        pb.Sampling(stop=["x"] * 17),
        pb.Sampling(stop=[""]),
        pb.Sampling(stop=["x" * 257]),
        pb.Sampling(stop_token_ids=range(65)),
    ],
)
def test_too_many_or_too_long_stops_are_refused(message: pb.Sampling) -> None:
    with pytest.raises(InvalidRequest, match=r"sampling\.stop"):
        sampling_from_proto(message)


def test_limits_themselves_are_allowed() -> None:
    message = pb.Sampling(stop=["x" * 256] * 16, stop_token_ids=range(64), logprobs=20, min_tokens=256)
    assert sampling_from_proto(message).min_tokens == 256


@pytest.mark.parametrize(
    ("change", "needed"),
    [
        ({}, False),
        ({"repetition_penalty": 1.5}, True),
        ({"presence_penalty": -0.5}, True),
        ({"frequency_penalty": 0.5}, True),
        ({"temperature": 1.0, "top_k": 3}, False),
    ],
)
def test_history_is_needed_by_penalties_only(change: dict[str, float], needed: bool) -> None:
    assert dataclasses.replace(SamplingParams(), **change).needs_history is needed  # type: ignore[arg-type]
