"""The model against transformers' own on the same weights, and against the reference kernels."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from diphase.checkpoints.dummy import files_from_dummy
from diphase.checkpoints.model_config import RopeScaling
from diphase.checkpoints.model_files import ModelFiles
from diphase.engine.base import Chunk, StepPlan
from diphase.engine.config import EngineConfig
from diphase.engine.engine import TorchEngine
from diphase.engine.sequence import Sequence
from diphase.engine.weights import drawn_tensors
from diphase.kernels import registry
from diphase.proto.ids import HandoffKey
from diphase.proto.sampling import SamplingParams
from diphase.proto.slo import Slo
from transformers import LlamaConfig, LlamaForCausalLM

PLAIN = files_from_dummy("dummy:tiny")
BIASED = replace(
    PLAIN,
    config=replace(
        PLAIN.config,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
        head_dim=48,
        rope_scaling=RopeScaling(kind="llama3", factor=8.0, original_context=64),
    ),
)
PROMPT = [random.Random(3).randrange(512) for _ in range(150)]


def transformers_logits(files: ModelFiles, dtype: torch.dtype) -> torch.Tensor:
    """[len(PROMPT), vocab_size], the forward pass as that library has it."""
    config = files.config
    rope: dict[str, object] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if (scaling := config.rope_scaling) is not None:
        rope |= {
            "rope_type": scaling.kind,
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_context,
        }
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_q_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            rms_norm_eps=config.rms_norm_eps,
            max_position_embeddings=config.context_length,
            tie_word_embeddings=config.tie_word_embeddings,
            attention_bias=config.attention_bias,
            mlp_bias=config.mlp_bias,
            rope_parameters=rope,
        )
    ).to(dtype)
    read = drawn_tensors(config, files.seed, dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(read(name))
        logits: torch.Tensor = model(torch.tensor([PROMPT])).logits[0]
    return logits


def sequence(num_tokens: int) -> Sequence:
    return Sequence(
        key=HandoffKey("r", 0),
        gateway_id="",
        token_ids=PROMPT[:num_tokens],
        num_prompt_tokens=num_tokens,
        params=SamplingParams(),
        slo=Slo(),
        arrived_at=0.0,
        block_table=[5, 9, 2, 31, 17, 1, 20, 8, 11, 4],
    )


def load(files: ModelFiles, dtype: str) -> TorchEngine:
    return TorchEngine.load(EngineConfig(model=files.name, dtype=dtype, kv_cache_mib=2), files=files)


def last_logits(engine: TorchEngine, pieces: list[int]) -> torch.Tensor:
    """Of the last token of the prompt's first sum(pieces) tokens, computed in those pieces."""
    of = sequence(sum(pieces))
    for num_tokens in pieces:
        samples = num_tokens == of.num_uncomputed
        plan = StepPlan(chunks=[Chunk(sequence=of, num_tokens=num_tokens, samples=samples)])
        logits = engine.logits(plan)
        of.num_computed += num_tokens
    return logits[0].float()


@pytest.mark.parametrize("files", [PLAIN, BIASED], ids=["plain", "biased, tied, scaled rope"])
def test_fp32_logits_equal_those_of_transformers(files: ModelFiles) -> None:
    expected = transformers_logits(files, torch.float32)
    engine = load(files, "fp32")
    for pieces in ([1], [150], [64, 48, 38], [99, 1, 1, 1]):
        error = (last_logits(engine, pieces) - expected[sum(pieces) - 1]).abs().max()
        assert float(error) < 1e-3
    engine.close()


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_rounded_weights_stay_close_to_fp32(dtype: str) -> None:
    expected = transformers_logits(PLAIN, torch.float32)[-1]
    engine = load(PLAIN, dtype)
    for pieces in ([150], [149, 1]):
        logits = last_logits(engine, pieces)
        assert float((logits - expected).abs().max()) < 0.15 * float(expected.abs().max())
        assert float(torch.corrcoef(torch.stack((logits, expected)))[0, 1]) > 0.99
    engine.close()


@pytest.fixture
def reference_engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[TorchEngine]:
    monkeypatch.setitem(registry._IMPLEMENTATIONS, "cpu", registry._IMPLEMENTATIONS["reference"])
    registry.kernels_for.cache_clear()
    engine = load(PLAIN, "fp32")
    yield engine
    engine.close()
    registry.kernels_for.cache_clear()


def test_the_model_runs_on_the_reference_kernels_too(reference_engine: TorchEngine) -> None:
    expected = transformers_logits(PLAIN, torch.float32)
    error = (last_logits(reference_engine, [30, 1]) - expected[30]).abs().max()
    assert float(error) < 1e-3


def test_drawn_weights_are_a_function_of_seed_and_name() -> None:
    read, again = (drawn_tensors(PLAIN.config, 0, torch.float32) for _ in range(2))
    name = "model.layers.2.mlp.up_proj.weight"
    assert torch.equal(read(name), again(name))
    assert not torch.equal(read(name), drawn_tensors(PLAIN.config, 1, torch.float32)(name))
    assert not torch.equal(read(name), read(name.replace("2", "3")))
    assert float(read(name).std() * PLAIN.config.hidden_size**0.5) == pytest.approx(1.0, abs=0.02)


def test_loading_tells_how_far_it_is() -> None:
    told: list[tuple[str, float]] = []
    TorchEngine.load(
        EngineConfig(model="dummy:tiny", kv_cache_mib=1),
        progress=lambda stage, share: told.append((stage, share)),
    ).close()
    assert told[0][0] == "loading weights"
    assert told[-1] == ("warming up", 1.0)
    loading = [share for stage, share in told if stage == "loading weights"]
    assert loading == sorted(loading)
    assert loading[-1] == 1.0
