"""The built-in model: what it says, and how exact the engine is on it."""

from __future__ import annotations

import json

import pytest
import torch
from diphase.checkpoints.lookup import resolve
from diphase.checkpoints.model_files import ModelFiles
from diphase.checkpoints.tokenizer import load_tokenizer
from diphase.checkpoints.weights import open_weights
from diphase.engine.base import Chunk, StepPlan
from diphase.engine.config import EngineConfig
from diphase.engine.engine import TorchEngine
from diphase.engine.generate import WHOLE, Batching, generate, recompute_error
from diphase.engine.sequence import Sequence
from diphase.kernels.linear_packed import can_pack
from diphase.proto.ids import HandoffKey
from diphase.proto.sampling import SamplingParams
from diphase.proto.slo import Slo
from transformers import LlamaConfig, LlamaForCausalLM

CAPITAL = "The capital of France is"
PROMPTS = (
    CAPITAL,
    "1, 2, 3, 4, 5,",
    "Write a short story about a lighthouse keeper who finds a letter. " * 5,
    "def fibonacci(n):",
)


@pytest.fixture(scope="module")
def files() -> ModelFiles:
    return resolve("smollm2")


def token_ids(files: ModelFiles, text: str) -> list[int]:
    return list(load_tokenizer(files).encode(text, add_special=False))


def load(files: ModelFiles, dtype: str, *, batch_invariant: bool = False) -> TorchEngine:
    config = EngineConfig(dtype=dtype, kv_cache_mib=48, batch_invariant=batch_invariant)
    return TorchEngine.load(config, files=files)


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_the_capital_of_france_is_paris(files: ModelFiles, dtype: str) -> None:
    engine = load(files, dtype)
    output = generate(engine, [token_ids(files, CAPITAL)], SamplingParams(max_tokens=2))[0]
    engine.close()
    assert load_tokenizer(files).decode([token.token_id for token in output]) == " Paris."


@pytest.mark.slow
def test_fp32_logits_equal_those_of_transformers(files: ModelFiles) -> None:
    source = open_weights(files)
    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32}
    model = LlamaForCausalLM(LlamaConfig(**json.loads(files.config.to_json())))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            raw = source.read(name)
            parameter.copy_(torch.frombuffer(raw.data, dtype=dtypes[raw.dtype]).view(raw.shape))
        prompt = token_ids(files, PROMPTS[2])
        expected = model(torch.tensor([prompt])).logits[0, -1]
    engine = load(files, "fp32")
    sequence = Sequence(
        key=HandoffKey("r", 0),
        gateway_id="",
        token_ids=prompt,
        num_prompt_tokens=len(prompt),
        params=SamplingParams(),
        slo=Slo(),
        arrived_at=0.0,
        block_table=list(range(engine.layout.num_blocks_for(len(prompt)))),
    )
    plan = StepPlan(chunks=[Chunk(sequence=sequence, num_tokens=len(prompt), samples=True)])
    error = (engine.logits(plan)[0] - expected).abs().max()
    engine.close()
    assert float(error) < 1e-3


@pytest.mark.skipif(
    not (can_pack(torch.zeros(16, 16, dtype=torch.bfloat16)) and torch.cpu._is_amx_tile_supported()),
    reason="the matrix library's order of sums was measured with AMX",
)
@pytest.mark.slow
def test_batch_invariance_makes_mixed_steps_and_recomputing_exact(files: ModelFiles) -> None:
    engine = load(files, "bf16", batch_invariant=True)
    prompts = [token_ids(files, text) for text in PROMPTS]
    params = SamplingParams(max_tokens=12, ignore_eos=True)

    def ids(batching: Batching) -> list[list[int]]:
        return [[token.token_id for token in out] for out in generate(engine, prompts, params, batching)]

    alone = ids(Batching(max_running=1, chunk_tokens=WHOLE))
    mixed = ids(Batching(max_running=4, chunk_tokens=16, preempt_every=6))
    error = recompute_error(engine, prompts[0], 8)
    engine.close()
    assert mixed == alone
    assert error.largest == 0.0
