"""Sampling parameters: defaults, ranges, and the way over the wire."""

from __future__ import annotations

import dataclasses

import pytest
from diphase.proto import inference_pb2 as pb
from diphase.proto.errors import InvalidRequest
from diphase.proto.sampling import SamplingParams, sampling_from_proto, sampling_to_proto
from hypothesis import given
from hypothesis import strategies as st


def f32(low: float, high: float, **options: bool) -> st.SearchStrategy[float]:
    return st.floats(low, high, width=32, **options)


PARAMS = st.builds(
    SamplingParams,
    max_tokens=st.integers(10, 2**31 - 1),
    min_tokens=st.integers(0, 10),
    temperature=f32(0, 100),
    top_k=st.integers(0, 2**31 - 1),
    top_p=f32(0, 1, exclude_min=True),
    min_p=f32(0, 1),
    repetition_penalty=f32(0, 10, exclude_min=True),
    presence_penalty=f32(-2, 2),
    frequency_penalty=f32(-2, 2),
    seed=st.integers(0, 2**64 - 1),
    stop=st.lists(st.text(min_size=1, max_size=8), max_size=3).map(tuple),
    stop_token_ids=st.lists(st.integers(0, 2**32 - 1), max_size=3).map(tuple),
    ignore_eos=st.booleans(),
    logprobs=st.none() | st.integers(0, 20),
)


@given(PARAMS)
def test_the_wire_changes_nothing(params: SamplingParams) -> None:
    message = pb.Sampling.FromString(sampling_to_proto(params).SerializeToString())
    assert sampling_from_proto(message) == params


def test_absent_fields_take_the_documented_defaults() -> None:
    params = sampling_from_proto(pb.Sampling())
    assert params == SamplingParams()
    assert params.max_tokens == 256
    assert params.greedy
    assert params.logprobs is None


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
        ("top_k", 2**31),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_p", float("nan")),
        ("min_p", -0.25),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 11.0),
        ("presence_penalty", -2.5),
        ("presence_penalty", 2.5),
        ("frequency_penalty", float("-inf")),
        ("logprobs", 21),
    ],
)
def test_values_out_of_range_are_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(InvalidRequest, match=rf"sampling\.{field} = .* out of range"):
        sampling_from_proto(pb.Sampling(**{field: value}))  # type: ignore[arg-type]


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
