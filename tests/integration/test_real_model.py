"""Fifty varied prompts on the built-in model: disaggregated output equals the single engine's.

Where a token differs, the two candidates lay closer together than recomputing a context changes logits.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from diphase.checkpoints.lookup import resolve
from diphase.checkpoints.tokenizer import load_tokenizer
from diphase.engine.base import Chunk, StepPlan
from diphase.engine.config import EngineConfig
from diphase.engine.engine import TorchEngine
from diphase.engine.generate import Batching, generate, recompute_error
from diphase.engine.sequence import Sequence
from diphase.proto.ids import HandoffKey
from diphase.proto.sampling import SamplingParams
from diphase.proto.slo import Slo

from .pair import run_pair

NUM_TOKENS = 16
MIN_EXACT = 49  # of 50: 98 %
TEMPLATES = (
    "The capital of {} is",
    "Write one sentence about {}.",
    "{}? I have never been to {}, but people say that",
    "Translate to French: the weather in {} is fine today. Answer:",
    "Once upon a time in {}, an old clockmaker found a letter under his door. It said that",
    "def population_of_{}(year: int) -> int:\n    ",
    "1, 2, 3, 4, 5, {}, 7, 8",
    "Question: What do you know about {}? Answer shortly and politely, in two sentences.\nAnswer:",
    "A recipe from {}: take two eggs, a cup of flour, a little salt and warm milk. First, " * 6,
    "The river of {} ran low that summer. " * 30 + "In the end",
)
PLACES = ("France", "Japan", "Kenya", "Iceland", "Peru")


@pytest.fixture(scope="module")
def engine() -> Iterator[TorchEngine]:
    engine = TorchEngine.load(EngineConfig(model="smollm2", kv_cache_mib=256))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    tokenizer = load_tokenizer(resolve("smollm2"))
    return [
        tokenizer.encode(template.replace("{}", place), True) for template in TEMPLATES for place in PLACES
    ]


def top_two_gap(engine: TorchEngine, token_ids: list[int]) -> float:
    """Between the two highest logits after `token_ids`."""
    sequence = Sequence(
        key=HandoffKey("gap", 0),
        gateway_id="",
        token_ids=token_ids,
        num_prompt_tokens=len(token_ids),
        params=SamplingParams(),
        slo=Slo(),
        arrived_at=0.0,
        block_table=list(range(engine.layout.num_blocks_for(len(token_ids)))),
    )
    chunk = Chunk(sequence=sequence, num_tokens=len(token_ids), samples=True)
    top: torch.Tensor = engine.logits(StepPlan(chunks=[chunk]))[0].float().topk(2).values
    return float(top[0] - top[1])


async def test_fifty_prompts_give_the_single_engines_tokens(
    engine: TorchEngine, prompts: list[list[int]]
) -> None:
    params = [SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)] * len(prompts)
    alone = Batching(max_running=1)
    expected = [[token.token_id for token in tokens] for tokens in generate(engine, prompts, params, alone)]
    outputs, _ = await run_pair(
        prompts, params, model="smollm2", transport="shm", chunk_budget=512, batch=8, decode_kv_mib=256
    )
    error = max(recompute_error(engine, prompts[i], NUM_TOKENS).largest for i in (0, 7, 22, 41))
    divergences = []
    for i, (output, wanted) in enumerate(zip(outputs, expected, strict=True)):
        if output != wanted:
            at = next(j for j in range(NUM_TOKENS) if output[j] != wanted[j])
            gap = top_two_gap(engine, prompts[i] + wanted[:at])
            divergences.append(f"prompt {i} at token {at}: top-two gap {gap:.4f}")
            assert gap <= error, f"{divergences[-1]} is more than the recompute error {error:.4f}"
    assert len(prompts) == 50
    print("\n".join([f"recompute error {error:.4f}; divergences: {len(divergences)}", *divergences]))
    assert len(prompts) - len(divergences) >= MIN_EXACT, divergences
