"""What is generated depends on prompt and parameters alone: not on batching, chunking or preemption."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from diphase.engine.base import StepPlan
from diphase.engine.config import EngineConfig
from diphase.engine.engine import TorchEngine
from diphase.engine.fake import FakeEngine
from diphase.engine.generate import WHOLE, Batching, generate, recompute_error
from diphase.kernels import paged_attention_cpu
from diphase.proto.errors import InvalidRequest
from diphase.proto.sampling import SamplingParams

GREEDY = SamplingParams(max_tokens=24, ignore_eos=True)
LENGTHS = (1, 2, 15, 16, 17, 33, 63, 64, 65, 100, 128, 129, 260, 513)


@pytest.fixture(scope="module", params=["grouped freely", "grouped by position"])
def engine(request: pytest.FixtureRequest) -> Iterator[TorchEngine]:
    """As this machine computes, and as one without AMX would."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "grouped by position":
            patch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
            patch.setattr(paged_attention_cpu, "_is_row_invariant", lambda *_: False)
        loaded = TorchEngine.load(EngineConfig(model="dummy:tiny", kv_cache_mib=80))
    yield loaded
    loaded.close()


def prompts(lengths: tuple[int, ...]) -> list[list[int]]:
    rng = random.Random(1)
    return [[rng.randrange(512) for _ in range(length)] for length in lengths]


def ids(
    engine: TorchEngine, wanted: list[list[int]], batching: Batching, params: SamplingParams = GREEDY
) -> list[list[int]]:
    return [[token.token_id for token in tokens] for tokens in generate(engine, wanted, params, batching)]


def alone(engine: TorchEngine, wanted: list[list[int]], params: SamplingParams = GREEDY) -> list[list[int]]:
    """One after the other, each prompt in one step."""
    return ids(engine, wanted, Batching(max_running=1, chunk_tokens=WHOLE), params)


@pytest.mark.parametrize(
    "batching",
    [
        Batching(max_running=16, chunk_tokens=WHOLE),
        Batching(max_running=16, chunk_tokens=64),
        Batching(max_running=3, chunk_tokens=16),
        Batching(max_running=5, chunk_tokens=160, preempt_every=7),
    ],
    ids=["batched", "chunked", "small chunks", "preempted"],
)
def test_output_is_the_same_however_steps_are_put_together(engine: TorchEngine, batching: Batching) -> None:
    wanted = prompts(LENGTHS)
    expected = alone(engine, wanted)
    assert ids(engine, wanted, batching) == expected
    assert len({tuple(output) for output in expected}) == len(LENGTHS)


def test_long_prompts_give_the_same_output_in_pieces_and_after_preemption(engine: TorchEngine) -> None:
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    wanted = prompts((4000, 2049))
    expected = alone(engine, wanted, params)
    assert ids(engine, wanted, Batching(chunk_tokens=512), params) == expected
    assert ids(engine, wanted, Batching(chunk_tokens=1024, preempt_every=9), params) == expected


def test_sampled_output_is_the_same_in_any_batch(engine: TorchEngine) -> None:
    params = SamplingParams(max_tokens=16, temperature=0.9, top_p=0.9, seed=4, ignore_eos=True)
    wanted = prompts((5, 40, 90))
    expected = alone(engine, wanted, params)
    assert ids(engine, wanted, Batching(chunk_tokens=32, preempt_every=5), params) == expected


def test_every_token_of_the_prompt_matters(engine: TorchEngine) -> None:
    """The equalities above could not fail if the dummy model ignored its context."""
    prompt = prompts((200,))[0]
    first = alone(engine, [prompt])[0]
    changed = 0
    for position in range(0, 200, 20):
        other = prompt.copy()
        other[position] = (other[position] + 1) % 512
        changed += alone(engine, [other])[0] != first
    assert changed >= 9


def test_recompute_error_is_zero_where_the_numerics_allow_it(engine: TorchEngine) -> None:
    error = recompute_error(engine, prompts((50,))[0], 12)
    assert error.largest == 0.0
    assert error.top_two_gap >= 0.0


def test_running_out_of_blocks_preempts_and_changes_nothing() -> None:
    """Four sequences of up to 60 tokens in 9 blocks of 16: two at a time fit, and not always."""
    small = FakeEngine(num_blocks=9)
    wanted = [[i + 1] * 20 for i in range(4)]
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    outputs = generate(small, wanted, params, Batching(chunk_tokens=16))
    for prompt, output in zip(wanted, outputs, strict=True):
        assert [token.token_id for token in output] == small.continuation(prompt, params, 40)
    small.close()


def test_a_prompt_that_can_never_fit_is_refused() -> None:
    small = FakeEngine(num_blocks=2)
    with pytest.raises(InvalidRequest, match="do not fit"):
        generate(small, [[1] * 40], GREEDY)
    small.close()


def test_a_closed_engine_computes_nothing() -> None:
    engine = TorchEngine.load(EngineConfig(model="dummy:tiny", kv_cache_mib=1))
    engine.close()
    with pytest.raises(RuntimeError, match="closed"):
        engine.execute(StepPlan(chunks=[]))
