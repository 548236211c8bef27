from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from diphase.checkpoints.lookup import resolve
from diphase.checkpoints.model_config import ModelConfig, RopeScaling
from diphase.proto.errors import CheckpointError


def config(path: Any) -> ModelConfig:
    return resolve(str(path)).config


def rope_freqs(factor: float, original: float, theta: float = 50000.0) -> tuple[tuple[int, ...], int, bytes]:
    """The table that llama.cpp's conversion writes for Llama 3.1 (LlamaModel.generate_extra_tensors)."""
    frequencies = 1.0 / theta ** (np.arange(0, 32, 2) / 32)
    wavelengths = 2 * np.pi / frequencies
    smooth = (original / wavelengths - 1.0) / (4.0 - 1.0)
    table = np.where(
        wavelengths < original / 4.0,
        1.0,
        np.where(wavelengths > original, factor, 1 / ((1 - smooth) / factor + smooth)),
    )
    return (16,), 0, table.astype(np.float32).tobytes()


def test_metadata_becomes_the_same_configuration_as_config_json(make: Any) -> None:
    directory = resolve(str(make.directory())).config
    assert config(make.gguf()) == directory


def test_absent_metadata_take_the_defaults_of_the_format(make: Any) -> None:
    read = config(
        make.gguf(
            llama__rope__freq_base=None,
            tokenizer__ggml__bos_token_id=None,
            tokenizer__ggml__eos_token_id=None,
        )
    )
    assert (read.rope_theta, read.bos_token_id, read.eos_token_ids) == (10000.0, None, ())


def test_every_token_that_ends_a_turn_counts(make: Any) -> None:
    read = config(make.gguf(tokenizer__ggml__eot_token_id=2, tokenizer__ggml__eom_token_id=1))
    assert read.eos_token_ids == (1, 2)


def test_linear_scaling_is_read(make: Any) -> None:
    path = make.gguf(llama__rope__scaling__type="linear", llama__rope__scaling__factor=4.0)
    assert config(path).rope_scaling == RopeScaling(kind="linear", factor=4.0)
    assert config(make.gguf(llama__rope__scaling__type="none")).rope_scaling is None


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_found_in_its_table(make: Any, factor: float) -> None:
    read = config(make.gguf(tensors={"rope_freqs.weight": rope_freqs(factor, 8192)}))
    assert read.rope_scaling == RopeScaling(kind="llama3", factor=factor)


def test_a_table_of_another_scaling_is_an_error(make: Any) -> None:
    with pytest.raises(CheckpointError, match="rope frequencies that no llama3 scaling"):
        resolve(str(make.gguf(tensors={"rope_freqs.weight": rope_freqs(8.0, 1024)})))


@pytest.mark.parametrize(
    ("shape", "number", "data", "message"),
    [
        ((3,), 1, b"\1" * 6, r"rope_freqs.weight is fp16 of shape \[3\]; it must be fp32 of shape \[16\]"),
        ((0,), 0, b"", r"is fp32 of shape \[0\]"),
        ((4, 4), 0, b"\1" * 64, r"is fp32 of shape \[4, 4\]"),
        ((16,), 0, np.full(16, np.inf, np.float32).tobytes(), "factor is inf"),
        ((16,), 0, np.full(16, np.nan, np.float32).tobytes(), "factor is nan"),
        ((16,), 0, np.zeros(16, np.float32).tobytes(), "factor is 0"),
        ((16,), 0, np.arange(16, dtype=np.float32).tobytes(), "that no llama3 scaling"),
    ],
)
def test_a_damaged_table_of_rope_frequencies_is_an_error(
    make: Any, shape: tuple[int, ...], number: int, data: bytes, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        resolve(str(make.gguf(tensors={"rope_freqs.weight": (shape, number, data)})))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"llama__rope__freq_base": 0.0}, "rope_theta is 0"),
        ({"llama__rope__freq_base": -1.0}, "rope_theta is -1"),
        ({"llama__attention__key_length": 0, "llama__rope__dimension_count": 0}, "head_dim is 0"),
    ],
)
def test_numbers_are_checked_before_the_table_of_rope_frequencies_is(
    make: Any, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        resolve(str(make.gguf(tensors={"rope_freqs.weight": rope_freqs(8.0, 8192)}, **changes)))


@pytest.mark.parametrize("layer", ["00", "10000", "9" * 200, "٣"])
def test_a_layer_has_a_plain_number_of_four_digits_at_most(make: Any, layer: str) -> None:
    with pytest.raises(CheckpointError, match=r"tensor blk\..* has no place in a Llama model"):
        resolve(str(make.gguf(tensors={f"blk.{layer}.attn_norm.weight": ((64,), 0, b"\0" * 256)})))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general__architecture": "qwen3"}, "architecture 'qwen3'; only llama"),
        ({"general__architecture": None}, "lacks the metadata general.architecture"),
        ({"general__architecture": 4}, "general.architecture = 4; it must be text"),
        ({"llama__expert_count": 8}, "mixture of 8 experts"),
        ({"split__count": 3}, "one of 3 parts; join them"),
        ({"llama__rope__dimension_count": 16}, "rotates 16 of 32"),
        ({"llama__rope__scaling__type": "yarn"}, "rope scaling 'yarn'"),
        ({"llama__rope__scaling__type": "linear"}, "lacks the metadata llama.rope.scaling.factor"),
        ({"llama__block_count": None}, "lacks the metadata llama.block_count"),
        ({"llama__block_count": 2.0}, "llama.block_count = 2.0; it must be a whole number"),
        ({"llama__attention__layer_norm_rms_epsilon": "x"}, "epsilon = x; it must be a number"),
        ({"llama__feed_forward_length": np.array([96, 96], np.int32)}, r"feed_forward_length = \[96, 96\]"),
        ({"llama__attention__head_count": 0}, "num_q_heads is 0"),
        ({"llama__block_count": 2**31 - 1}, "num_layers is 2147483647; it must be from 1 to 4096"),
    ],
)
def test_what_is_not_supported_is_named(make: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        resolve(str(make.gguf(**changes)))


def test_a_file_without_an_embedding_is_an_error(make: Any) -> None:
    weights = {"model.norm.weight": make.weights["model.norm.weight"]}
    with pytest.raises(CheckpointError, match=r"lacks the tensor token_embd.weight"):
        resolve(str(make.gguf(weights=weights)))
