"""What the ranks of a worker say to each other: steps that come back as they were, and nothing damaged."""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Iterator

import numpy as np
import pytest
from diphase.engine import rank_wire
from diphase.engine.config import EngineConfig
from diphase.engine.rank_wire import Kind, RankSpec
from diphase.engine.step_rows import StepRows
from diphase.kernels.paged_attention import Segment
from diphase.proto.errors import CheckpointError, DiphaseError, InternalError, WorkerLost
from hypothesis import given, settings
from hypothesis import strategies as st


@st.composite
def steps(draw: st.DrawFn) -> StepRows:
    numbers = st.integers(0, 2**40)
    segments = [
        Segment(
            block_table=draw(st.lists(numbers, max_size=5)),
            first_position=draw(numbers),
            num_rows=draw(st.integers(1, 4)),
            single=draw(st.booleans()),
        )
        for _ in range(draw(st.integers(1, 5)))
    ]
    num_tokens = sum(segment.num_rows for segment in segments)
    table = np.random.default_rng(draw(numbers)).integers(0, 2**40, (4, num_tokens))
    return StepRows(table=table, segments=segments, prompts=draw(st.booleans()))


@settings(max_examples=100, deadline=None)
@given(steps())
def test_a_step_comes_back_as_it_was(step: StepRows) -> None:
    again = StepRows.from_bytes(step.to_bytes())
    assert again.segments == step.segments
    assert again.prompts == step.prompts
    np.testing.assert_array_equal(again.table, step.table)


@settings(max_examples=200, deadline=None)
@given(steps(), st.integers(0, 1 << 30), st.booleans())
def test_a_damaged_step_is_refused_or_another_step(step: StepRows, seed: int, cut: bool) -> None:
    """Never an error of another kind, nor rows that no segment has."""
    rng = random.Random(seed)
    data = bytearray(step.to_bytes())
    if cut:
        del data[rng.randrange(len(data)) :]
    else:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    try:
        read = StepRows.from_bytes(bytes(data))
    except InternalError:
        return
    assert read.table.shape == (4, sum(segment.num_rows for segment in read.segments))


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(20.0)
        theirs.settimeout(20.0)
        yield ours, theirs


def test_frames_arrive_in_order_and_one_brings_a_descriptor(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = ends
    memory = os.memfd_create("test")
    rank_wire.send(ours, Kind.READY, rank_wire.ready_payload(77), memory)
    rank_wire.send(ours, Kind.STEP, b"x" * 1000)
    kind, payload, fd = rank_wire.receive(theirs)
    assert (kind, rank_wire.ready_size(payload)) == (Kind.READY, 77)
    assert fd is not None
    assert os.fstat(fd).st_ino == os.fstat(memory).st_ino
    os.close(fd)
    os.close(memory)
    assert rank_wire.receive(theirs) == (Kind.STEP, b"x" * 1000, None)
    ours.close()
    with pytest.raises(WorkerLost):
        rank_wire.receive(theirs)


@pytest.mark.parametrize(
    "data",
    [
        b"XXXX" + bytes(12),
        b"DPRK" + (9).to_bytes(4, "little") + bytes(8),
        b"DPRK" + (3).to_bytes(4, "little") + (1 << 40).to_bytes(8, "little"),
    ],
    ids=["magic", "kind", "length"],
)
def test_what_is_no_frame_is_refused(ends: tuple[socket.socket, socket.socket], data: bytes) -> None:
    ends[0].sendall(data)
    with pytest.raises(InternalError, match="begins no frame"):
        rank_wire.receive(ends[1])


def test_a_frame_that_breaks_off_is_a_lost_rank(ends: tuple[socket.socket, socket.socket]) -> None:
    ends[0].sendall(b"DPRK" + (3).to_bytes(4, "little") + (100).to_bytes(8, "little") + b"some")
    ends[0].close()
    with pytest.raises(WorkerLost):
        rank_wire.receive(ends[1])


def test_a_rank_is_told_its_whole_configuration() -> None:
    config = EngineConfig(
        model="dummy:tiny", dtype="fp32", tensor_parallel=2, cores=(3, 4), rank_timeout_s=2.5
    )
    spec = RankSpec(config=config, rank=1, fingerprint="f", store_path="/proc/1/fd/9")
    assert RankSpec.from_bytes(spec.to_bytes()) == spec


@pytest.mark.parametrize("error", [CheckpointError("no such file"), ValueError("7"), WorkerLost("gone")])
def test_a_failure_keeps_its_class_and_words(error: Exception) -> None:
    told = rank_wire.failure(rank_wire.failed_payload(error))
    assert type(told) is (type(error) if isinstance(error, DiphaseError) else InternalError)
    assert str(error) in str(told)


def test_a_wrong_ready_is_refused() -> None:
    with pytest.raises(InternalError):
        rank_wire.ready_size(b"123")
