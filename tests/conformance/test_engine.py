"""What every Engine must do, run against the real one and the fake one."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from diphase.engine.base import Chunk, Engine, SampledToken, StepPlan
from diphase.engine.config import EngineConfig
from diphase.engine.engine import TorchEngine
from diphase.engine.fake import FakeEngine
from diphase.engine.sequence import Sequence
from diphase.kv_transfer.reshard import canonical_runs
from diphase.proto.ids import HandoffKey
from diphase.proto.sampling import SamplingParams
from diphase.proto.slo import Slo

MakeEngine = Callable[[], Engine]


def real_engine() -> Engine:
    return TorchEngine.load(EngineConfig(model="dummy:tiny", kv_cache_mib=4))


def two_ranks() -> Engine:
    return TorchEngine.load(EngineConfig(model="dummy:tiny", kv_cache_mib=4, tensor_parallel=2))


def fake_engine() -> Engine:
    return FakeEngine(num_blocks=256)


@pytest.fixture(params=[real_engine, two_ranks, fake_engine])
def make_engine(request: pytest.FixtureRequest) -> Iterator[MakeEngine]:
    made: list[Engine] = []

    def make() -> Engine:
        made.append(request.param())
        return made[-1]

    yield make
    for engine in made:
        engine.close()


@pytest.fixture
def engine(make_engine: MakeEngine) -> Engine:
    return make_engine()


def sequence(
    num_tokens: int, blocks: list[int], params: SamplingParams | None = None, *, seed: int = 1
) -> Sequence:
    token_ids = [(seed * 131 + i * i * 7 + i * 31) % 490 + 5 for i in range(num_tokens)]
    return Sequence(
        key=HandoffKey(f"request-{blocks[0]}", 0),
        gateway_id="",
        token_ids=token_ids,
        num_prompt_tokens=num_tokens,
        params=params or SamplingParams(max_tokens=64),
        slo=Slo(),
        arrived_at=0.0,
        block_table=blocks,
    )


def chunk(of: Sequence, num_tokens: int | None = None) -> Chunk:
    num_tokens = num_tokens or of.num_uncomputed
    return Chunk(sequence=of, num_tokens=num_tokens, samples=num_tokens == of.num_uncomputed)


def step(engine: Engine, *chunks: Chunk) -> list[SampledToken | None]:
    """Runs the chunks and does to the sequences what a scheduler does."""
    result = engine.execute(StepPlan(chunks=list(chunks)))
    for done, token in zip(chunks, result.tokens, strict=True):
        done.sequence.num_computed += done.num_tokens
        if token is not None:
            done.sequence.token_ids.append(token.token_id)
    return result.tokens


def runs_of(engine: Engine, block: int, first_layer: int, num_layers: int) -> list[memoryview]:
    """The bytes of a range of layers of a block, in canonical order."""
    runs = canonical_runs(
        engine.layout, engine.sharding, [block], first_layer=first_layer, num_layers=num_layers
    )
    return [
        engine.kv_regions[region].buffer[offset : offset + size] for region, offset, size in runs.tolist()
    ]


def kv_of(engine: Engine, block: int, first_layer: int = 0, num_layers: int | None = None) -> bytes:
    num_layers = engine.layout.num_layers if num_layers is None else num_layers
    return b"".join(runs_of(engine, block, first_layer, num_layers))


def put_kv(engine: Engine, block: int, data: bytes) -> None:
    for run in runs_of(engine, block, 0, engine.layout.num_layers):
        run[:], data = data[: len(run)], data[len(run) :]
    assert not data


def decode(engine: Engine, of: Sequence, num_tokens: int) -> list[int]:
    """The next `num_tokens` tokens, prompt first if it is not computed."""
    for _ in range(num_tokens):
        step(engine, chunk(of))
    return of.token_ids[-num_tokens:]


def test_it_says_how_large_its_pool_is(engine: Engine) -> None:
    assert engine.num_blocks >= 200
    assert len(engine.kv_regions) == engine.sharding.num_ranks
    for rank, region in enumerate(engine.kv_regions):
        block_bytes = engine.sharding.rank_layout(engine.layout, rank).block_bytes
        assert len(region.buffer) == engine.num_blocks * block_bytes
        assert not region.buffer.readonly
    assert engine.limits.vocab_size > 495


def test_its_descriptor_maps_the_pool(engine: Engine) -> None:
    decode(engine, sequence(20, [7, 3]), 1)
    for rank, region in enumerate(engine.kv_regions):
        assert region.fd is not None
        layout = engine.sharding.rank_layout(engine.layout, rank)
        offset, length = layout.run(7, 0, layout.num_layers)
        with mmap.mmap(os.dup(region.fd), 0) as other:
            assert any(other[offset : offset + length])
            assert other[offset : offset + length] == bytes(region.buffer[offset : offset + length])


def test_chunks_that_sample_get_a_token_in_the_plan_s_order(engine: Engine) -> None:
    first, second, third = sequence(20, [0, 1]), sequence(30, [2, 3], seed=2), sequence(9, [4], seed=3)
    tokens = step(engine, chunk(first, 16), chunk(second), chunk(third))
    assert tokens[0] is None
    assert tokens[1] is not None
    assert tokens[2] is not None
    assert decode(engine, sequence(30, [5, 6], seed=2), 1) == [tokens[1].token_id]
    assert decode(engine, sequence(9, [8], seed=3), 1) == [tokens[2].token_id]


def test_output_does_not_depend_on_chunks_batch_mates_or_recompute(engine: Engine) -> None:
    expected = decode(engine, sequence(70, [0, 1, 2, 3, 4, 5]), 10)

    chunked, mate = sequence(70, [10, 11, 12, 13, 14, 15]), sequence(33, [20, 21, 22, 23], seed=5)
    step(engine, chunk(chunked, 32), chunk(mate))
    step(engine, chunk(mate), chunk(chunked, 16))
    step(engine, chunk(chunked), chunk(mate))
    for _ in range(4):
        step(engine, chunk(mate), chunk(chunked))
    chunked.num_computed = 0  # preempted: its blocks are new ones
    chunked.block_table = [40, 41, 42, 43, 44, 45]
    for _ in range(5):
        step(engine, chunk(chunked), chunk(mate))
    assert chunked.token_ids[70:] == expected


def test_decoding_goes_on_where_the_kv_was_moved_to(make_engine: MakeEngine) -> None:
    """Disaggregation in small: prefill on one engine, bytes copied block by block, decode on another."""
    prefill, decoder = make_engine(), make_engine()
    expected = decode(prefill, sequence(50, [0, 1, 2, 3]), 8)
    moved = sequence(50, [9, 5, 30, 14])
    step(prefill, chunk(moved))
    target = [17, 2, 11, 12]
    for source, destination in zip(moved.block_table, target, strict=True):
        put_kv(decoder, destination, kv_of(prefill, source))
    moved.block_table = target
    decode(decoder, moved, 7)
    assert moved.token_ids[50:] == expected


def test_a_wrong_block_changes_the_output(engine: Engine) -> None:
    """The test above could not fail if the output did not depend on the bytes."""
    expected = decode(engine, sequence(50, [0, 1, 2, 3]), 8)
    damaged = sequence(50, [0, 1, 2, 3])
    step(engine, chunk(damaged))
    put_kv(engine, 1, bytes(engine.layout.block_bytes))
    decode(engine, damaged, 7)
    assert damaged.token_ids[50:] != expected


def test_only_the_slots_of_the_step_s_tokens_are_written(engine: Engine) -> None:
    layout = engine.layout
    for region in engine.kv_regions:
        region.buffer[:] = b"\x01" * len(region.buffer)
    one = sequence(20, [6, 4])
    step(engine, chunk(one))
    # In units of one head's vector: [block, layer and k|v and head, slot].
    width = layout.token_bytes // (layout.num_layers * 2 * layout.num_kv_heads)
    rows = layout.num_layers * 2 * layout.num_kv_heads
    blank = b"\x01" * width
    for block in range(engine.num_blocks):
        written = {6: 16, 4: 4}.get(block, 0)
        data = kv_of(engine, block)
        for row in range(rows):
            for slot in range(layout.block_size):
                begin = (row * layout.block_size + slot) * width
                assert (data[begin : begin + width] != blank) == (slot < written)


def test_the_hook_hears_of_each_layer_once_its_kv_is_there(engine: Engine) -> None:
    layout, seen = engine.layout, []

    def hook(layer: int) -> None:
        seen.append((layer, kv_of(engine, 3, layer, 1)))

    engine.execute(StepPlan(chunks=[chunk(sequence(16, [3]))]), hook)
    assert [layer for layer, _ in seen] == list(range(layout.num_layers))
    assert all(kv == kv_of(engine, 3, layer, 1) and any(kv) for layer, kv in seen)


def test_sequences_are_left_as_they_were(engine: Engine) -> None:
    one = sequence(40, [1, 2, 3])
    before = replace(one, token_ids=one.token_ids.copy(), block_table=one.block_table.copy())
    engine.execute(StepPlan(chunks=[chunk(one)]))
    assert one.token_ids == before.token_ids
    assert one.block_table == before.block_table
    assert (one.num_computed, one.num_cached) == (0, 0)


def test_stop_tokens_are_not_sampled_below_min_tokens(engine: Engine) -> None:
    first = decode(engine, sequence(20, [0, 1]), 1)[0]
    params = SamplingParams(max_tokens=8, min_tokens=1, stop_token_ids=(first,))
    assert decode(engine, sequence(20, [2, 3], params), 1) != [first]
    late = SamplingParams(max_tokens=8, stop_token_ids=(first,))
    assert decode(engine, sequence(20, [4, 5], late), 1) == [first]


def test_sampled_tokens_follow_seed_and_index_in_any_batch(engine: Engine) -> None:
    params = SamplingParams(temperature=1.0, seed=8, max_tokens=16)
    expected = decode(engine, sequence(20, [0, 1], params), 6)
    again, mate = sequence(20, [2, 3], params), sequence(11, [4], seed=9)
    for _ in range(6):
        step(engine, chunk(mate), chunk(again))
    assert again.token_ids[20:] == expected
    other = [decode(engine, sequence(20, [5, 6], replace(params, seed=seed)), 6) for seed in range(20, 26)]
    assert any(tokens != expected for tokens in other)


def test_logprobs_come_as_asked_for(engine: Engine) -> None:
    params = SamplingParams(logprobs=3)
    (token,) = step(engine, chunk(sequence(20, [0, 1], params)))
    assert token is not None
    assert len(token.top) == 3
    assert token.top[0] == (token.token_id, token.logprob)
    assert 0.0 > token.top[0][1] >= token.top[1][1] >= token.top[2][1]
    (bare,) = step(engine, chunk(sequence(20, [2, 3])))
    assert bare is not None
    assert bare.top == []


def test_closing_twice_is_closing_once(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.close()
    engine.close()
    assert not engine.kv_regions
