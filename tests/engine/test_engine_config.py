from __future__ import annotations

import pytest
from diphase.engine.config import EngineConfig
from diphase.proto.errors import ConfigError


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", ""),
        ("dtype", "fp8"),
        ("block_size", 12),
        ("block_size", 128),
        ("kv_cache_mib", 0),
        ("threads", 0),
        ("threads", 5000),
    ],
)
def test_impossible_values_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field.removeprefix("model") or "model"):
        EngineConfig(**{field: value})  # type: ignore[arg-type]


def test_activations_are_fp32_only_where_everything_is() -> None:
    assert [EngineConfig(dtype=dtype).activation_dtype for dtype in ("bf16", "fp32", "int8")] == [
        "bf16",
        "fp32",
        "bf16",
    ]
