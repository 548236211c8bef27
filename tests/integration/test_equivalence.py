"""Disaggregated workers give the single engine's tokens, one for one, on a tiny model of dummy weights."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
from diphase.engine.config import EngineConfig
from diphase.engine.engine import TorchEngine
from diphase.engine.generate import WHOLE, generate
from diphase.kv_transfer.codecs.codec_choice import Choice, LinkEstimate
from diphase.kv_transfer.coders import Coders
from diphase.proto.sampling import SamplingParams

from .pair import run_pair

NUM_TOKENS = 24
LENGTHS = (1, 2, 15, 16, 17, 63, 64, 65, 130, 255, 511, 700, 1024, 1500, 2600, 4000)


@pytest.fixture(scope="module")
def single_engine() -> Iterator[TorchEngine]:
    engine = TorchEngine.load(EngineConfig(model="dummy:tiny", kv_cache_mib=64))
    yield engine
    engine.close()


def prompts(lengths: tuple[int, ...], vocab_size: int, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(2, vocab_size) for _ in range(length)] for length in lengths]


def truth(engine: TorchEngine, of: list[list[int]], params: list[SamplingParams]) -> list[list[int]]:
    return [[token.token_id for token in tokens] for tokens in generate(engine, of, params)]


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("chunk_budget", [64, 512, WHOLE], ids=["chunks of 64", "chunks of 512", "whole"])
@pytest.mark.parametrize("batch", [1, 4, 16])
async def test_greedy_output_equals_the_single_engines(
    single_engine: TorchEngine, transport: str, chunk_budget: int, batch: int
) -> None:
    lengths = LENGTHS if batch == 16 else LENGTHS[::2] if batch == 4 else LENGTHS[1::4]
    of = prompts(lengths, single_engine.limits.vocab_size, seed=batch)
    params = [SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)] * len(of)
    outputs, _ = await run_pair(of, params, transport=transport, chunk_budget=chunk_budget, batch=batch)
    assert outputs == truth(single_engine, of, params)


@pytest.mark.parametrize("transport", ["shm", "tcp", "nixl"])
async def test_staged_layers_give_the_single_engines_tokens(
    single_engine: TorchEngine, transport: str
) -> None:
    of = prompts(LENGTHS[::2], single_engine.limits.vocab_size, seed=5)
    params = [SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)] * len(of)
    outputs, _ = await run_pair(
        of,
        params,
        transport=transport,
        chunk_budget=512,
        batch=4,
        staging="always",
        layerwise_tokens=0,
        layers_per_push=1,
    )
    assert outputs == truth(single_engine, of, params)


async def test_prompts_that_are_quicker_computed_again_than_sent_change_no_token(
    single_engine: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[str] = []

    def choose(self: Coders, *args: Any, **options: Any) -> Choice:
        choice = choose_truly(self, *args, **options)
        chosen.append(choice.codec)
        return choice

    choose_truly = Coders.choose
    monkeypatch.setattr(Coders, "choose", choose)
    monkeypatch.setattr(LinkEstimate, "settled_bytes_per_s", lambda self, now: 1e3)
    of = prompts(LENGTHS[:13:2], single_engine.limits.vocab_size, seed=11)
    params = [SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)] * len(of)
    outputs, _ = await run_pair(of, params, transport="tcp", chunk_budget=512, batch=1)
    assert outputs == truth(single_engine, of, params)
    assert chosen.count("recompute") >= len(of) - 1, "before the first prompt nobody knows how long one takes"


@pytest.mark.parametrize("transport", ["shm", "tcp", "nixl"])
async def test_forced_preemption_changes_no_token(single_engine: TorchEngine, transport: str) -> None:
    of = prompts((40, 90, 100, 120, 17, 64, 80, 33) * 2, single_engine.limits.vocab_size, seed=7)
    params = [SamplingParams(max_tokens=90, ignore_eos=True)] * len(of)
    outputs, preemptions = await run_pair(
        of, params, transport=transport, chunk_budget=512, batch=16, decode_kv_mib=1
    )
    assert preemptions > 0
    assert outputs == truth(single_engine, of, params)


async def test_seeded_sampling_equals_the_single_engines(single_engine: TorchEngine) -> None:
    of = prompts(LENGTHS[:10], single_engine.limits.vocab_size, seed=3)
    params = [
        SamplingParams(
            max_tokens=NUM_TOKENS,
            temperature=0.8,
            top_k=(0, 40)[i % 2],
            top_p=(1.0, 0.9)[i % 3 == 0],
            min_p=(0.0, 0.02)[i % 4 == 0],
            repetition_penalty=(1.0, 1.2)[i % 2],
            frequency_penalty=0.1 * (i % 3),
            seed=1000 + i,
            ignore_eos=True,
        )
        for i in range(len(of))
    ]
    outputs, _ = await run_pair(of, params, transport="shm", chunk_budget=128, batch=10)
    assert outputs == truth(single_engine, of, params)
