from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from typing import Any

import pytest
from diphase.checkpoints.dummy import PRESETS
from diphase.checkpoints.model_config import ModelConfig, RopeScaling, parse_hf_config
from diphase.proto.errors import CheckpointError

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def parse(config: dict[str, Any], generation: dict[str, Any] | None = None) -> ModelConfig:
    return parse_hf_config(config, generation, where="config.json")


def test_transformers_4_layout(make: Any) -> None:
    config = parse(
        make.config(rope_scaling={"type": "linear", "factor": 2}, attention_bias=True, mlp_bias=True)
    )
    assert config == ModelConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=96,
        num_layers=2,
        num_q_heads=4,
        num_kv_heads=2,
        head_dim=32,
        rms_norm_eps=1e-5,
        rope_theta=50000.0,
        rope_scaling=RopeScaling(kind="linear", factor=2.0),
        context_length=512,
        bos_token_id=0,
        eos_token_ids=(1,),
        attention_bias=True,
        mlp_bias=True,
    )


def test_transformers_5_layout_is_the_same_model(make: Any) -> None:
    old = make.config(rope_theta=500000.0, rope_scaling=LLAMA3)
    new = make.config(rope_theta=None, rope_parameters={**LLAMA3, "rope_theta": 500000.0})
    assert parse(new) == parse(old)
    plain = make.config(rope_theta=None, rope_parameters={"rope_type": "default", "rope_theta": 50000.0})
    assert parse(plain) == parse(make.config())


def test_absent_values_take_the_defaults_of_transformers() -> None:
    config = parse(
        {
            "model_type": "llama",
            "vocab_size": 100,
            "hidden_size": 64,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
        }
    )
    assert (config.num_kv_heads, config.head_dim, config.context_length) == (4, 16, 2048)
    assert (config.rms_norm_eps, config.rope_theta, config.rope_scaling) == (1e-6, 10000.0, None)
    assert (config.bos_token_id, config.eos_token_ids, config.tie_word_embeddings) == (None, (), False)


def test_end_tokens_of_generation_config_come_first_and_none_twice(make: Any) -> None:
    assert parse(make.config(eos_token_id=[5, 1]), {"eos_token_id": [7, 5]}).eos_token_ids == (7, 5, 1)
    assert parse(make.config(eos_token_id=3), {"eos_token_id": None}).eos_token_ids == (3,)


@pytest.mark.parametrize("config", [*PRESETS.values()], ids=[*PRESETS])
def test_to_json_reads_back_unchanged(config: ModelConfig) -> None:
    assert parse(json.loads(config.to_json())) == config
    changed = replace(config, bos_token_id=1, eos_token_ids=(2, 3), attention_bias=True, mlp_bias=True)
    assert parse(json.loads(changed.to_json())) == changed
    linear = replace(config, rope_scaling=RopeScaling(kind="linear", factor=4.0))
    assert parse(json.loads(linear.to_json())) == linear


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            r"architectures \['GPT2LMHeadModel'\]; only LlamaForCausalLM",
        ),
        ({"architectures": None, "model_type": "mixtral"}, "model_type 'mixtral'"),
        ({"architectures": None, "model_type": None}, "model_type None"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantised \('gptq'\)"),
        ({"vocab_size": None}, "config.json lacks vocab_size"),
        ({"hidden_size": "64"}, "hidden_size = '64'; it must be a whole number"),
        ({"num_hidden_layers": True}, "num_hidden_layers = True"),
        ({"num_hidden_layers": 0}, "num_layers is 0"),
        ({"num_attention_heads": 0}, "num_attention_heads = 0"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps = 'tiny'; it must be a number"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps is nan"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps is -1"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings = 1; it must be true or false"),
        ({"eos_token_id": "x"}, "eos_token_id = 'x'"),
        ({"eos_token_id": 320}, "special token id 320 is outside the vocabulary of 320"),
        ({"num_key_value_heads": 3}, "4 query heads cannot be shared among 3"),
        ({"head_dim": 15}, "head_dim is 15"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4}}, "rope scaling 'yarn'; only linear and llama3"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4}}, "rope scaling 'dynamic'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope parameters of config.json lacks factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "factor is 0.5"),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, "high_freq_factor"),
        ({"rope_scaling": "long"}, "rope parameters 'long'"),
        ({"partial_rotary_factor": 0.5}, "rotates only 50%"),
        ({"hidden_size": 10**400}, "hidden_size is 1000"),
        ({"vocab_size": 2**22 + 1}, "vocab_size is 4194305; it must be from 1 to 4194304"),
        ({"num_hidden_layers": 10**9}, "num_layers is 1000000000; it must be from 1 to 4096"),
        ({"max_position_embeddings": 2**31}, "context_length is 2147483648"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps is inf"),
        ({"rope_theta": 5e-324}, "rope_theta is 5e-324"),
        ({"rope_scaling": {"type": "linear", "factor": 10**400}}, "factor is inf"),
        ({"rope_scaling": {"type": "linear", "factor": math.nan}}, "factor is nan"),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": math.inf}}, "high_freq_factor"),
        ({"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 0}}, "original context of 0"),
        ({"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 10**400}}, "original context of 1"),
    ],
)
def test_what_is_not_supported_is_named(make: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        parse(make.config(**changes))


def test_messages_stay_short_and_nested_values_may_be_of_any_depth(make: Any) -> None:
    nested: Any = []
    for _ in range(sys.getrecursionlimit()):
        nested = [nested]
    for changes in (
        {"hidden_act": nested},
        {"vocab_size": nested},
        {"architectures": nested},
        {"architectures": None, "model_type": nested},
        {"quantization_config": {"quant_method": nested}},
        {"rope_scaling": nested},
        {"rope_scaling": {"type": nested}},
        {"eos_token_id": ["x" * 10**6]},
    ):
        with pytest.raises(CheckpointError) as caught:
            parse(make.config(**changes))
        assert len(caught.value.message) < 300


@pytest.mark.parametrize(
    "scaling", [None, {"rope_type": "linear", "factor": 4.0}, LLAMA3, {**LLAMA3, "factor": 32.0}]
)
def test_rotary_frequencies_equal_those_of_transformers(make: Any, scaling: dict[str, Any] | None) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    fields = make.config(
        head_dim=128,
        rope_theta=None,
        rope_parameters={"rope_theta": 5e5, **(scaling or {"rope_type": "default"})},
    )
    expected = LlamaRotaryEmbedding(LlamaConfig(**fields)).inv_freq
    assert parse(fields).rope_inv_freq() == pytest.approx(expected.tolist(), rel=1e-6)
