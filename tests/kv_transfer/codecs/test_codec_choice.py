"""The break-even rule, and the estimates that it is fed with."""

from __future__ import annotations

import pytest
from diphase.kv_transfer.codecs.codec import RAW, Codec, load_codecs
from diphase.kv_transfer.codecs.codec_calibration import calibrate
from diphase.kv_transfer.codecs.codec_choice import (
    MEASUREMENTS,
    RECOMPUTE,
    SMALLEST_BURST_BYTES,
    STALE_AFTER_S,
    CodecEstimate,
    LinkEstimate,
    choose,
)
from diphase.proto.clock import MonotonicClock
from diphase.proto.kv_layout import KvLayout
from hypothesis import given
from hypothesis import strategies as st

CODECS = load_codecs(["int8", "fp8", "cachegen-2"])
MIB = 1024 * 1024
SIZE = 10_000_000

speeds = st.floats(1e3, 1e12)


def known(ratio: float, encode_bytes_per_s: float, decode_bytes_per_s: float) -> CodecEstimate:
    estimate = CodecEstimate()
    estimate.encoded(SIZE, round(SIZE / ratio), SIZE / encode_bytes_per_s)
    estimate.decoded(SIZE, SIZE / decode_bytes_per_s)
    return estimate


def seconds_of(name: str, size: int, bandwidth: float, estimates: dict[str, CodecEstimate]) -> float:
    if name == RAW:
        return size / bandwidth
    e = estimates[name]
    assert e.ratio
    assert e.encode_bytes_per_s
    assert e.decode_bytes_per_s
    return size / e.ratio / bandwidth + size / e.encode_bytes_per_s + size / e.decode_bytes_per_s


@given(
    size=st.integers(1, 10**12),
    num_tokens=st.integers(1, 10**6),
    bandwidth=speeds,
    prefill=st.none() | st.floats(1.0, 1e6),
    estimates=st.dictionaries(
        st.sampled_from(sorted(CODECS)), st.builds(known, st.floats(0.5, 20), speeds, speeds)
    ),
    allowed=st.sets(st.sampled_from(sorted(CODECS))),
    backlog=st.integers(0, 10**12),
)
def test_the_choice_is_the_quickest_of_what_is_allowed(
    *,
    size: int,
    num_tokens: int,
    bandwidth: float,
    prefill: float | None,
    estimates: dict[str, CodecEstimate],
    allowed: set[str],
    backlog: int,
) -> None:
    choice = choose(
        size,
        num_tokens=num_tokens,
        bytes_per_s=bandwidth,
        allowed=[CODECS[name] for name in allowed],
        estimates=estimates,
        backlog_bytes=backlog,
        prefill_tokens_per_s=prefill,
    )
    possible = {
        name: backlog / bandwidth + seconds_of(name, size, bandwidth, estimates)
        for name in {RAW} | (allowed & estimates.keys())
    }
    if prefill is not None:
        possible[RECOMPUTE] = num_tokens / prefill
    assert choice.seconds == pytest.approx(min(possible.values()))
    assert possible[choice.codec] == pytest.approx(choice.seconds)
    assert choice.reason.startswith(choice.codec)


def test_nothing_is_chosen_that_is_not_allowed() -> None:
    free = {name: known(10, 1e12, 1e12) for name in CODECS}

    def chosen(allowed: list[Codec]) -> str:
        return choose(SIZE, num_tokens=100, bytes_per_s=1e6, allowed=allowed, estimates=free).codec

    assert chosen([CODECS["int8"]]) == "int8"
    assert chosen([]) == RAW


def test_an_unknown_link_gets_raw_even_where_recomputing_looks_cheap() -> None:
    choice = choose(
        SIZE,
        num_tokens=1,
        bytes_per_s=None,
        allowed=CODECS.values(),
        estimates={"int8": known(2, 1e12, 1e12)},
        prefill_tokens_per_s=1e9,
    )
    assert (choice.codec, choice.seconds) == (RAW, None)
    assert "not known" in choice.reason


def test_a_codec_that_nobody_measured_is_not_chosen() -> None:
    half = CodecEstimate()
    half.encoded(SIZE, SIZE // 10, 1e-9)  # how fast it decodes is not known
    for estimates in ({}, {"int8": CodecEstimate()}, {"int8": half}):
        choice = choose(SIZE, num_tokens=1, bytes_per_s=1.0, allowed=CODECS.values(), estimates=estimates)
        assert choice.codec == RAW


def test_the_choice_turns_at_the_break_even_bandwidth() -> None:
    estimate = known(4.0, 150e6, 300e6)
    turn = estimate.break_even_bytes_per_s()
    assert turn == pytest.approx(0.75 / (1 / 150e6 + 1 / 300e6), rel=1e-6)
    assert turn is not None
    for bandwidth, wanted in ((0.99 * turn, "cachegen-2"), (1.01 * turn, RAW)):
        choice = choose(
            SIZE,
            num_tokens=400,
            bytes_per_s=bandwidth,
            allowed=[CODECS["cachegen-2"]],
            estimates={"cachegen-2": estimate},
        )
        assert choice.codec == wanted
    assert known(0.9, 1e9, 1e9).break_even_bytes_per_s() == 0.0
    assert CodecEstimate().break_even_bytes_per_s() is None


def test_the_reason_has_the_numbers() -> None:
    choice = choose(
        SIZE,
        num_tokens=434,
        bytes_per_s=10e6,
        allowed=[CODECS["cachegen-2"]],
        estimates={"cachegen-2": known(4.0, 200e6, 200e6)},
        prefill_tokens_per_s=434.0,
    )
    assert choice.reason == (
        "cachegen-2 350.0 ms against raw 1000.0, recompute 1000.0 ms for 10000000 bytes behind 0 at 10.0 MB/s"
    )


def test_bandwidth_is_bytes_over_the_time_that_something_was_on_its_way() -> None:
    link = LinkEstimate()
    assert link.bytes_per_s(0.0) is None
    link.started(10.0)
    link.started(10.0)
    link.done(MIB, 11.0)
    link.done(MIB, 12.0)  # beside the other one: both took two seconds, not three
    assert link.bytes_per_s(12.0) == pytest.approx(MIB)
    link.started(40.0)  # the pause does not count
    link.done(2 * MIB, 42.0)
    assert link.bytes_per_s(42.0) == pytest.approx(MIB)


def test_a_link_counts_as_slow_only_after_a_few_measurements_and_again_after_a_pause() -> None:
    link, now = LinkEstimate(), 0.0
    for began in (0.0, MEASUREMENTS + STALE_AFTER_S + 0.5):
        for number in range(MEASUREMENTS):
            assert link.settled_bytes_per_s(began + number) is None
            link.started(began + number)
            now = began + number + 0.5
            link.done(MIB, now)
            assert link.bytes_per_s(now) == pytest.approx(2 * MIB), "good enough for the size of a push"
        assert link.settled_bytes_per_s(now) == pytest.approx(2 * MIB)
        assert link.settled_bytes_per_s(now + STALE_AFTER_S + 0.1) is None


def test_tiny_writes_tell_nothing_of_the_bandwidth() -> None:
    link = LinkEstimate()
    for i in range(100):
        link.started(float(i))
        link.done(SMALLEST_BURST_BYTES - 1, i + 0.5)
    assert link.bytes_per_s(100.0) is None
    link.started(100.0)
    link.done(MIB, 100.0)  # no time passed on this clock
    assert link.bytes_per_s(100.0) is None
    link.started(101.0)
    link.done(MIB, 102.0)
    link.started(102.0)
    link.done(8, 110.0)
    assert link.bytes_per_s(110.0) == pytest.approx(MIB)


def test_a_failed_write_spoils_no_estimate() -> None:
    link = LinkEstimate()
    link.started(0.0)
    link.started(0.0)
    link.failed(50.0)
    link.done(MIB, 51.0)  # since the failure
    assert link.bytes_per_s(51.0) == pytest.approx(MIB)


def test_a_link_that_is_never_idle_is_measured_all_the_same() -> None:
    link = LinkEstimate()
    link.started(0.0)
    for i in range(1, 40):
        link.started(float(i))
        link.done(MIB, float(i))
    assert link.bytes_per_s(40.0) == pytest.approx(MIB, rel=0.2)


def test_the_recent_past_outweighs_the_distant_one_and_then_it_is_unknown() -> None:
    link = LinkEstimate()
    for i in range(100):
        link.started(float(i))
        link.done(8 * MIB, i + 0.01)
    for i in range(100, 140):
        link.started(float(i))
        link.done(8 * MIB, i + 0.9)
    now = 139.9
    assert link.bytes_per_s(now) == pytest.approx(8 * MIB / 0.9, rel=0.05)
    assert link.bytes_per_s(now + STALE_AFTER_S) is not None
    assert link.bytes_per_s(now + STALE_AFTER_S + 0.1) is None


@given(st.lists(st.tuples(st.integers(1, 1 << 30), st.floats(1e-4, 10)), min_size=1, max_size=30))
def test_an_estimate_lies_between_the_slowest_and_the_fastest_measured(
    bursts: list[tuple[int, float]],
) -> None:
    link, now = LinkEstimate(), 0.0
    rates = []
    for num_bytes, seconds in bursts:
        link.started(now)
        now += seconds
        link.done(num_bytes, now)
        if num_bytes >= SMALLEST_BURST_BYTES:
            rates.append(num_bytes / seconds)
    estimate = link.bytes_per_s(now)
    assert (estimate is None) == (not rates)
    if estimate is not None:
        assert 0.999 * min(rates) <= estimate <= 1.001 * max(rates)


@pytest.mark.parametrize("name", ["int8", "cachegen-2"])
def test_a_calibrated_codec_may_be_chosen_at_once(name: str) -> None:
    layout = KvLayout(model="m", num_layers=4, num_kv_heads=2, head_dim=64, block_size=16, dtype="bf16")
    estimate = calibrate(CODECS[name], layout, MonotonicClock())
    assert estimate.ratio is not None
    assert estimate.ratio > 1.8
    choice = choose(SIZE, num_tokens=1, bytes_per_s=1e3, allowed=[CODECS[name]], estimates={name: estimate})
    assert choice.codec == name
