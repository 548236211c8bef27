"""Model shapes from config.json: three families, sizes that are published, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from diphase.cluster.planner.model_shape import KNOWN_MODELS, load_model_shape, parse_model_shape
from diphase.proto.errors import ConfigError

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
OPT: dict[str, Any] = {
    "architectures": ["OPTForCausalLM"],
    "hidden_size": 5120,
    "ffn_dim": 20480,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "vocab_size": 50272,
    "word_embed_proj_dim": 5120,
}
QWEN: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 5120,
    "intermediate_size": 25600,
    "num_hidden_layers": 64,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
}


@pytest.mark.parametrize(("config", "name"), [(LLAMA, "llama3.1-8b"), (OPT, "opt-13b"), (QWEN, "qwen3-32b")])
def test_a_config_gives_the_known_shape(tmp_path: Path, config: dict[str, Any], name: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_model_shape(str(tmp_path)) == load_model_shape(name)
    assert load_model_shape(str(tmp_path / "config.json")) == KNOWN_MODELS[name]


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("opt-13b", 12.9),
        ("opt-66b", 65.7),
        ("opt-175b", 174.6),
        ("bloom-176b", 176.2),
        ("llama2-70b", 69.0),
        ("llama3.1-8b", 8.03),
        ("llama3.1-70b", 70.6),
        ("qwen3-32b", 32.8),
    ],
)
def test_parameters_are_the_published_number(name: str, billions: float) -> None:
    assert KNOWN_MODELS[name].parameters / 1e9 == pytest.approx(billions, rel=0.01)


def test_kv_of_a_token() -> None:
    assert KNOWN_MODELS["opt-66b"].kv_bytes_per_token() * 512 / 1e9 == pytest.approx(1.21, abs=0.01)
    assert KNOWN_MODELS["llama3.1-8b"].kv_bytes_per_token(1) == 65_536


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM.*only LlamaForCausalLM"),
        ({"architectures": None}, "None.*only LlamaForCausalLM"),
        ({"hidden_size": None}, "hidden_size = None"),
        ({"hidden_size": 4096.5}, "hidden_size = 4096.5"),
        ({"num_hidden_layers": 0}, "num_hidden_layers = 0"),
        ({"vocab_size": True}, "vocab_size = True"),
        ({"num_key_value_heads": 5}, "32 query heads cannot be shared among 5"),
        ({"use_sliding_window": True}, "sliding window"),
        ({"word_embed_proj_dim": 512}, "projected embedding"),
        ({"num_local_experts": 8}, "num_local_experts = 8: a model with experts"),
        ({"num_experts": 128}, "num_experts = 128: a model with experts"),
        ({"n_routed_experts": 160}, "n_routed_experts = 160: a model with experts"),
        ({"num_experts_per_tok": 2}, "num_experts_per_tok = 2: a model with experts"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings = 'false'; it must be true or false"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings = 1; it must be true or false"),
    ],
)
def test_what_cannot_be_modelled_is_named(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_model_shape({**LLAMA, **change}, where="config.json")


def test_unknown_names_and_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'gpt-9'.*llama3\.1-70b"):
        load_model_shape("gpt-9")
    path = tmp_path / "config.json"
    for text, said in (("{", "not valid JSON"), ("[]", "no JSON object")):
        path.write_text(text)
        with pytest.raises(ConfigError, match=said):
            load_model_shape(str(path))
