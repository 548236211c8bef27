"""The shape of a Llama-architecture model, and how config.json spells it (transformers 4 and 5 layouts).

Pure data and arithmetic: no files are opened here, and no tensor library is known. GGUF metadata is turned
into the same ModelConfig by gguf_llama.py.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ..proto.errors import CheckpointError

RopeScalingKind = Literal["linear", "llama3"]

_SIZE = (1, 2**31 - 1)
_NUMBER = (1e-30, 1e30)
"""Powers and quotients of such numbers are finite and not zero."""
_LIMITS: Mapping[str, tuple[float, float]] = {
    "vocab_size": (1, 2**22),
    "hidden_size": _SIZE,
    "intermediate_size": _SIZE,
    "num_layers": (1, 4096),
    "num_q_heads": _SIZE,
    "num_kv_heads": _SIZE,
    "head_dim": _SIZE,
    "rms_norm_eps": _NUMBER,
    "rope_theta": _NUMBER,
    "context_length": _SIZE,
}
"""Far beyond every published model, and what a damaged or hostile file may make this process build."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """How the rotary frequencies were stretched for a longer context."""

    kind: RopeScalingKind
    factor: float
    """All frequencies (linear) or the low ones (llama3) are divided by it."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths above original_context / low_freq_factor are scaled in full."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths below original_context / high_freq_factor stay as they are."""
    original_context: int = 8192
    """llama3: context of the pretraining, tokens."""

    def __post_init__(self) -> None:
        if not 1.0 <= self.factor <= _NUMBER[1]:
            raise CheckpointError(f"rope scaling factor is {self.factor}; it must be at least 1 and finite")
        if self.kind == "llama3" and not _NUMBER[1] > self.high_freq_factor > self.low_freq_factor > 0:
            raise CheckpointError(
                f"rope scaling needs high_freq_factor ({self.high_freq_factor}) above "
                f"low_freq_factor ({self.low_freq_factor}) above 0"
            )
        if not _SIZE[0] <= self.original_context <= _SIZE[1]:
            raise CheckpointError(
                f"rope scaling has an original context of {self.original_context}; "
                f"it must be from {_SIZE[0]} to {_SIZE[1]}"
            )

    def scale(self, inv_freq: float) -> float:
        """The stretched inverse frequency (transformers, modeling_rope_utils.py)."""
        if self.kind == "linear":
            return inv_freq / self.factor
        wavelength = 2.0 * math.pi / inv_freq
        if wavelength < self.original_context / self.high_freq_factor:
            return inv_freq
        if wavelength > self.original_context / self.low_freq_factor:
            return inv_freq / self.factor
        span = self.high_freq_factor - self.low_freq_factor
        smooth = (self.original_context / wavelength - self.low_freq_factor) / span
        return (1.0 - smooth) * inv_freq / self.factor + smooth * inv_freq


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A decoder of the Llama family: RMSNorm, rotary positions, grouped-query attention, gated SiLU."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    """Width of the MLP."""
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    context_length: int = 2048
    """Tokens, prompt and completion together."""
    tie_word_embeddings: bool = False
    """Whether the output projection is the embedding; lm_head.weight then does not exist."""
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    """Any of them ends the output; empty for a base model that names none."""
    attention_bias: bool = False
    """Whether q, k, v and o projections have a bias."""
    mlp_bias: bool = False
    """Whether gate, up and down projections have a bias."""

    def __post_init__(self) -> None:
        for name, (least, most) in _LIMITS.items():
            value = getattr(self, name)
            if not least <= value <= most:  # NaN neither
                raise CheckpointError(f"the model's {name} is {value}; it must be from {least} to {most}")
        if self.num_q_heads % self.num_kv_heads:
            raise CheckpointError(
                f"{self.num_q_heads} query heads cannot be shared among {self.num_kv_heads} key-value heads"
            )
        if self.head_dim % 2:
            raise CheckpointError(f"head_dim is {self.head_dim}; rotary positions need an even one")
        for token_id in (*self.eos_token_ids, *(() if self.bos_token_id is None else (self.bos_token_id,))):
            if not 0 <= token_id < self.vocab_size:
                raise CheckpointError(
                    f"special token id {token_id} is outside the vocabulary of {self.vocab_size}"
                )

    def rope_inv_freq(self) -> list[float]:
        """Inverse frequencies of the rotary embedding, scaling applied; head_dim / 2 radians a position."""
        plain = [self.rope_theta ** (-2.0 * i / self.head_dim) for i in range(self.head_dim // 2)]
        return plain if self.rope_scaling is None else [self.rope_scaling.scale(f) for f in plain]

    def to_json(self) -> str:
        """config.json in the layout of transformers 4, keys sorted; parse_hf_config reads it back
        unchanged."""
        fields: dict[str, object] = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_q_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "max_position_embeddings": self.context_length,
            "tie_word_embeddings": self.tie_word_embeddings,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": list(self.eos_token_ids),
            "attention_bias": self.attention_bias,
            "mlp_bias": self.mlp_bias,
        }
        if (scaling := self.rope_scaling) is not None:
            rope: dict[str, object] = {"rope_type": scaling.kind, "factor": scaling.factor}
            if scaling.kind == "llama3":
                rope |= {
                    "low_freq_factor": scaling.low_freq_factor,
                    "high_freq_factor": scaling.high_freq_factor,
                    "original_max_position_embeddings": scaling.original_context,
                }
            fields["rope_scaling"] = rope
        return json.dumps(fields, indent=2, sort_keys=True)


class _Fields:
    """Typed access to a JSON object; a missing or mistyped value is a CheckpointError that names it."""

    def __init__(self, values: Mapping[str, object], where: str) -> None:
        self._values = values
        self._where = where

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._values.get(key)
        value = default if value is None else value
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        raise self._error(key, value, "a whole number")

    def number(self, key: str, default: float | None = None) -> float:
        value = self._values.get(key)
        value = default if value is None else value
        if isinstance(value, int | float) and not isinstance(value, bool):
            try:
                return float(value)
            except OverflowError:
                return math.inf
        raise self._error(key, value, "a number")

    def boolean(self, key: str) -> bool:
        value = self._values.get(key)
        if value is None or isinstance(value, bool):
            return bool(value)
        raise self._error(key, value, "true or false")

    def token_ids(self, key: str) -> tuple[int, ...]:
        """One id, a list of ids, or nothing."""
        value = self._values.get(key)
        items = value if isinstance(value, list) else [] if value is None else [value]
        if any(isinstance(item, bool) or not isinstance(item, int) for item in items):
            raise self._error(key, value, "a token id or a list of them")
        return tuple(items)

    def _error(self, key: str, value: object, wanted: str) -> CheckpointError:
        if value is None:
            return CheckpointError(f"{self._where} lacks {key}; it must be {wanted}")
        return CheckpointError(f"{self._where} has {key} = {reprlib.repr(value)}; it must be {wanted}")


def parse_hf_config(
    config: Mapping[str, object], generation: Mapping[str, object] | None = None, *, where: str
) -> ModelConfig:
    """ModelConfig from the objects in config.json and generation_config.json; `where` names them in errors.

    Raises:
        CheckpointError: another architecture, a quantised checkpoint, an unknown kind of rope scaling, or a
            value that lacks or has the wrong type.
    """
    _check_supported(config, where)
    fields = _Fields(config, where)
    num_q_heads = fields.integer("num_attention_heads")
    hidden_size = fields.integer("hidden_size")
    if num_q_heads <= 0:
        raise CheckpointError(f"{where} has num_attention_heads = {num_q_heads}; it must be positive")
    rope_theta, rope_scaling = _rope(config, where)
    eos_token_ids = _Fields(generation or {}, where).token_ids("eos_token_id") + fields.token_ids(
        "eos_token_id"
    )
    bos_token_ids = fields.token_ids("bos_token_id")
    return ModelConfig(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=fields.integer("num_hidden_layers"),
        num_q_heads=num_q_heads,
        num_kv_heads=fields.integer("num_key_value_heads", num_q_heads),
        head_dim=fields.integer("head_dim", hidden_size // num_q_heads),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        context_length=fields.integer("max_position_embeddings", 2048),
        tie_word_embeddings=fields.boolean("tie_word_embeddings"),
        bos_token_id=bos_token_ids[0] if bos_token_ids else None,
        eos_token_ids=tuple(dict.fromkeys(eos_token_ids)),
        attention_bias=fields.boolean("attention_bias"),
        mlp_bias=fields.boolean("mlp_bias"),
    )


def _check_supported(config: Mapping[str, object], where: str) -> None:
    architectures = config.get("architectures")
    named = architectures if isinstance(architectures, list) else []
    if named and "LlamaForCausalLM" not in named:
        raise CheckpointError(
            f"{where} names the architectures {reprlib.repr(named)}; only LlamaForCausalLM is supported"
        )
    if not named and config.get("model_type") != "llama":
        raise CheckpointError(
            f"{where} has model_type {reprlib.repr(config.get('model_type'))}; "
            "only the llama architecture is supported"
        )
    if (activation := config.get("hidden_act", "silu")) != "silu":
        raise CheckpointError(f"{where} has hidden_act {reprlib.repr(activation)}; only silu is supported")
    if isinstance(quantised := config.get("quantization_config"), dict):
        raise CheckpointError(
            f"{where} says the weights are quantised "
            f"({reprlib.repr(quantised.get('quant_method', 'unknown method'))}); "
            "use the unquantised checkpoint or a GGUF file"
        )


def _rope(config: Mapping[str, object], where: str) -> tuple[float, RopeScaling | None]:
    """(theta, scaling) from rope_parameters (transformers 5) or rope_theta and rope_scaling (4)."""
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(parameters, dict):
        raise CheckpointError(
            f"{where} has rope parameters {reprlib.repr(parameters)}; they must be an object"
        )
    fields = _Fields({**config, **parameters}, f"the rope parameters of {where}")
    theta = fields.number("rope_theta", 10000.0)
    if (share := fields.number("partial_rotary_factor", 1.0)) != 1.0:
        raise CheckpointError(
            f"{where} rotates only {share:.0%} of each head; only whole heads are supported"
        )
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    match kind:
        case "default" | None:
            return theta, None
        case "linear":
            return theta, RopeScaling(kind="linear", factor=fields.number("factor"))
        case "llama3":
            return theta, RopeScaling(
                kind="llama3",
                factor=fields.number("factor"),
                low_freq_factor=fields.number("low_freq_factor"),
                high_freq_factor=fields.number("high_freq_factor"),
                original_context=fields.integer("original_max_position_embeddings"),
            )
    raise CheckpointError(
        f"{where} has rope scaling {reprlib.repr(kind)}; only linear and llama3 are supported"
    )
