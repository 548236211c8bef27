"""The fake engine's output depends on every byte of the KV that it reads."""

from __future__ import annotations

import pytest
from diphase.engine.base import Chunk, StepPlan
from diphase.engine.fake import FAKE_LAYOUT, FAKE_LIMITS, FakeEngine, StepCost
from diphase.engine.sequence import Sequence
from diphase.proto.kv_layout import KvLayout
from diphase.proto.sampling import SamplingParams

from .sequences import make_sequence

BLOCKS = [7, 3, 9, 1, 12, 20]


def generate(engine: FakeEngine, sequence: Sequence, num_tokens: int, chunk: int = 16) -> list[int]:
    first = sequence.num_tokens
    while sequence.num_tokens - first < num_tokens:
        n = min(chunk, sequence.num_uncomputed)
        samples = n == sequence.num_uncomputed
        result = engine.execute(StepPlan(chunks=[Chunk(sequence=sequence, num_tokens=n, samples=samples)]))
        sequence.num_computed += n
        if token := result.tokens[0]:
            sequence.token_ids.append(token.token_id)
    return sequence.token_ids[first:]


@pytest.mark.parametrize("chunk", [1, 5, 16, 64])
def test_output_is_the_continuation_however_it_is_chunked(chunk: int) -> None:
    engine = FakeEngine(num_blocks=32)
    sequence = make_sequence("a", 40, max_tokens=30)
    expected = engine.continuation(sequence.token_ids, sequence.params, 30)
    sequence.block_table = list(BLOCKS)
    assert generate(engine, sequence, 30, chunk) == expected


def test_output_does_not_depend_on_layout_of_blocks() -> None:
    small = KvLayout(model="fake", num_layers=3, num_kv_heads=2, head_dim=2, block_size=8, dtype="fp32")
    large = KvLayout(model="fake", num_layers=3, num_kv_heads=2, head_dim=2, block_size=32, dtype="fp32")
    outputs = []
    for layout in (small, large):
        engine = FakeEngine(num_blocks=32, layout=layout)
        sequence = make_sequence("a", 30)
        sequence.block_table = list(BLOCKS)
        outputs.append(generate(engine, sequence, 8))
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("position", [0, 17, 39])
def test_one_wrong_byte_of_the_context_changes_the_output(position: int) -> None:
    engine = FakeEngine(num_blocks=32)
    sequence = make_sequence("a", 40, max_tokens=30)
    expected = engine.continuation(sequence.token_ids, sequence.params, 9)
    sequence.block_table = list(BLOCKS)
    assert generate(engine, sequence, 1) == expected[:1]
    block, slot = BLOCKS[position // 16], position % 16
    head_bytes = FAKE_LAYOUT.head_dim * 2
    offset = block * FAKE_LAYOUT.block_bytes + FAKE_LAYOUT.layer_bytes + slot * head_bytes
    engine.kv_buffer[offset] ^= 1
    assert generate(engine, sequence, 8) != expected[1:]


def test_bytes_beyond_the_context_do_not_matter() -> None:
    engine = FakeEngine(num_blocks=32)
    sequence = make_sequence("a", 20)
    expected = engine.continuation(sequence.token_ids, sequence.params, 8)
    engine.kv_buffer[:] = b"\xff" * len(engine.kv_buffer)
    sequence.block_table = list(BLOCKS)
    assert generate(engine, sequence, 8) == expected


def test_ends_are_not_sampled_before_min_tokens() -> None:
    engine = FakeEngine(num_blocks=8)
    prompt = make_sequence("a", 10).token_ids
    free = engine.continuation(prompt, SamplingParams(), 1)
    stop = SamplingParams(min_tokens=1, stop_token_ids=(free[0],))
    assert engine.continuation(prompt, stop, 1) != free


def test_layers_are_reported_in_order_and_each_is_written_when_reported() -> None:
    engine = FakeEngine(num_blocks=4)
    sequence = make_sequence("a", 16)
    sequence.block_table = [2]
    written: list[list[bool]] = []

    def on_layer(layer: int) -> None:
        block = memoryview(engine.kv_buffer)[2 * FAKE_LAYOUT.block_bytes : 3 * FAKE_LAYOUT.block_bytes]
        size = FAKE_LAYOUT.layer_bytes
        written.append([any(block[i * size : (i + 1) * size]) for i in range(FAKE_LAYOUT.num_layers)])

    engine.execute(StepPlan(chunks=[Chunk(sequence=sequence, num_tokens=16, samples=True)]), on_layer)
    assert written == [[True, False], [True, True]]


def test_a_step_costs_what_its_chunks_add_up_to() -> None:
    slept: list[float] = []
    cost = StepCost(base_s=1.0, prefill_token_s=0.1, decode_sequence_s=0.01, context_token_s=0.001)
    engine = FakeEngine(num_blocks=32, cost=cost, sleep=slept.append)
    prompt, decoding = make_sequence("a", 20), make_sequence("b", 30)
    prompt.block_table, decoding.block_table, decoding.num_computed = [0, 1], [2, 3], 29
    plan = StepPlan(
        chunks=[
            Chunk(sequence=prompt, num_tokens=16, samples=False),
            Chunk(sequence=decoding, num_tokens=1, samples=True),
        ]
    )
    result = engine.execute(plan)
    assert result.duration_s == pytest.approx(1.0 + 1.6 + 0.01 + 0.029)
    assert sum(slept) == pytest.approx(result.duration_s)
    assert result.tokens[0] is None
    assert result.tokens[1] is not None


def test_log_probabilities_come_only_where_asked_for() -> None:
    engine = FakeEngine(num_blocks=4)
    sequence = make_sequence("a", 10, logprobs=3)
    sequence.block_table = [0]
    token = engine.execute(StepPlan(chunks=[Chunk(sequence=sequence, num_tokens=10, samples=True)])).tokens[0]
    assert token is not None
    assert token.top[0][0] == token.token_id
    assert len(token.top) == 3
    assert token.logprob == token.top[0][1]


def test_close_is_idempotent() -> None:
    engine = FakeEngine(num_blocks=4)
    engine.close()
    engine.close()
    assert not engine.kv_regions
    assert FAKE_LIMITS.vocab_size == engine.limits.vocab_size
