"""The sizes of a dense decoder that its time and memory follow from, by name or from its config.json.

Reads more architectures than the engine can run (checkpoints/model_config.py refuses those), and no weights:
a plan may be for a model that other engines serve. Knows no hardware.
"""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from ...proto.errors import ConfigError

ARCHITECTURES = ("LlamaForCausalLM", "OPTForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Of a decoder with grouped-query attention and a dense MLP."""

    hidden_size: int
    intermediate_size: int
    """Width of the MLP."""
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    gated: bool = True
    """Whether the MLP has a gate beside its up projection."""
    tied: bool = False
    """Whether the output projection is the embedding."""

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if not isinstance(value, bool) and value < 1:
                raise ConfigError(f"the model's {item.name} is {value}; it must be at least 1")
        if self.num_q_heads % self.num_kv_heads:
            raise ConfigError(
                f"{self.num_q_heads} query heads cannot be shared among {self.num_kv_heads} key-value heads"
            )

    @property
    def layer_parameters(self) -> int:
        """Elements of one layer's matrices."""
        attention = 2 * self.hidden_size * (self.num_q_heads + self.num_kv_heads) * self.head_dim
        return attention + (3 if self.gated else 2) * self.hidden_size * self.intermediate_size

    @property
    def vocab_parameters(self) -> int:
        """Elements of the output projection, and of the embedding."""
        return self.hidden_size * self.vocab_size

    @property
    def parameters(self) -> int:
        """Elements of all matrices."""
        return self.num_layers * self.layer_parameters + (1 if self.tied else 2) * self.vocab_parameters

    def kv_bytes_per_token(self, element_bytes: int = 2) -> int:
        """Of all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * element_bytes


MOST = 10**9
"""Of any size: a config.json that says more is none of a model."""

KNOWN_MODELS: Mapping[str, ModelShape] = {
    name: ModelShape(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_layers=layers,
        num_q_heads=q_heads,
        num_kv_heads=kv_heads,
        head_dim=128,
        vocab_size=vocab,
        gated=not name.startswith(("opt", "bloom")),
        tied=name.startswith(("opt", "bloom")),
    )
    for name, (hidden, mlp, layers, q_heads, kv_heads, vocab) in {
        "opt-13b": (5120, 20480, 40, 40, 40, 50272),
        "opt-66b": (9216, 36864, 64, 72, 72, 50272),
        "opt-175b": (12288, 49152, 96, 96, 96, 50272),
        "bloom-176b": (14336, 57344, 70, 112, 112, 250880),
        "llama2-70b": (8192, 28672, 80, 64, 8, 32000),
        "llama3.1-8b": (4096, 14336, 32, 32, 8, 128256),
        "llama3.1-70b": (8192, 28672, 80, 64, 8, 128256),
        "qwen3-32b": (5120, 25600, 64, 64, 8, 151936),
    }.items()
}
"""As their config.json says."""


def load_model_shape(name_or_path: str) -> ModelShape:
    """A model of KNOWN_MODELS, or of a config.json or the folder that holds it.

    Raises:
        ConfigError: it is neither, or its config.json is of another architecture or malformed.
    """
    if name_or_path in KNOWN_MODELS:
        return KNOWN_MODELS[name_or_path]
    path = Path(name_or_path)
    path = path / "config.json" if os.path.isdir(path) else path
    if not os.path.isfile(path):  # Path's own raises where a name is too long
        raise ConfigError(
            f"no model is called {reprlib.repr(name_or_path)} and there is no such config.json; "
            f"use one of {', '.join(sorted(KNOWN_MODELS))}, or the path of a config.json"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise ConfigError(f"{path} cannot be read: {exc.strerror or exc}") from exc
    except (ValueError, RecursionError) as exc:
        raise ConfigError(f"{path} is not valid JSON: {exc}") from exc
    if not isinstance(config, dict):
        raise ConfigError(f"{path} holds no JSON object")
    return parse_model_shape(config, where=str(path))


def parse_model_shape(config: Mapping[str, object], *, where: str) -> ModelShape:
    """Of the object in a config.json of transformers; `where` names it in errors.

    Raises:
        ConfigError: another architecture, experts, or a value that lacks or has the wrong type.
    """
    architectures = config.get("architectures")
    named = (
        [name for name in architectures if name in ARCHITECTURES] if isinstance(architectures, list) else []
    )
    if not named:
        raise ConfigError(
            f"{where} names the architectures {reprlib.repr(architectures)}; "
            f"only {', '.join(ARCHITECTURES)} are known"
        )
    for key, value in config.items():
        if "expert" in key and value and value != 1:
            raise ConfigError(
                f"{where} has {key} = {reprlib.repr(value)}: a model with experts, which is not modelled; "
                "plan a dense one"
            )
    opt = named[0] == "OPTForCausalLM"
    hidden_size = _integer(config, "hidden_size", where)
    num_q_heads = _integer(config, "num_attention_heads", where)
    if config.get("use_sliding_window") or config.get("word_embed_proj_dim", hidden_size) != hidden_size:
        raise ConfigError(f"{where} has a sliding window or a projected embedding; neither is modelled")
    return ModelShape(
        hidden_size=hidden_size,
        intermediate_size=_integer(config, "ffn_dim" if opt else "intermediate_size", where),
        num_layers=_integer(config, "num_hidden_layers", where),
        num_q_heads=num_q_heads,
        num_kv_heads=_integer(config, "num_key_value_heads", where, num_q_heads),
        head_dim=_integer(config, "head_dim", where, hidden_size // num_q_heads),
        vocab_size=_integer(config, "vocab_size", where),
        gated=not opt,
        tied=_truth(config, "tie_word_embeddings", where, opt),
    )


def _integer(config: Mapping[str, object], key: str, where: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MOST:
        raise ConfigError(
            f"{where} has {key} = {reprlib.repr(value)}; it must be a whole number from 1 to {MOST}"
        )
    return value


def _truth(config: Mapping[str, object], key: str, where: str, default: bool) -> bool:
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, bool):
        raise ConfigError(f"{where} has {key} = {reprlib.repr(value)}; it must be true or false")
    return value
