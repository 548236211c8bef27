from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from diphase.checkpoints.gguf import GgufFile
from diphase.checkpoints.gguf_llama import half_split_rows
from diphase.checkpoints.lookup import resolve
from diphase.checkpoints.model_files import ModelFiles
from diphase.checkpoints.weights import RawTensor, WeightSource, expected_shapes, open_weights
from diphase.proto.errors import CheckpointError
from numpy.typing import NDArray


def numbers(tensor: RawTensor) -> NDArray[np.float32]:
    if tensor.dtype == "bf16":
        bits = np.frombuffer(tensor.data, np.uint16).astype(np.uint32) << 16
        return bits.view(np.float32).reshape(tensor.shape)
    dtype = {"fp16": np.float16, "fp32": np.float32}[tensor.dtype]
    return np.frombuffer(tensor.data, dtype).astype(np.float32).reshape(tensor.shape)


def all_numbers(source: WeightSource) -> dict[str, NDArray[np.float32]]:
    return {name: numbers(source.read(name)) for name in source.names()}


@pytest.mark.parametrize(("dtype", "name"), [("F32", "fp32"), ("F16", "fp16"), ("BF16", "bf16")])
@pytest.mark.parametrize("num_shards", [1, 3])
def test_directories_give_their_tensors(make: Any, dtype: str, name: str, num_shards: int) -> None:
    files = resolve(str(make.directory(num_shards=num_shards, dtype=dtype)))
    source = open_weights(files)
    assert list(source.names()) == list(expected_shapes(files.config))
    assert set(source.names()) == set(make.weights)
    for tensor, values in make.weights.items():
        raw = source.read(tensor)
        assert (raw.dtype, raw.shape, source.dtype(tensor)) == (name, values.shape, name)
        assert bytes(raw.data) == make.quantised(values, dtype)


@pytest.mark.parametrize(
    ("kind", "tolerance"),
    [("F32", 0.0), ("F16", 0.002), ("BF16", 0.04), ("Q8_0", 0.03), ("Q4_1", 0.4), ("Q4_0", 4.0)],
)
def test_gguf_files_give_the_same_tensors_under_the_same_names(
    make: Any, kind: str, tolerance: float
) -> None:
    files = resolve(str(make.gguf(kind)))
    source = open_weights(files)
    assert set(source.names()) == set(make.weights)
    for name, values in all_numbers(source).items():
        assert np.abs(values - make.weights[name]).max() <= tolerance, name
        # Quantised and stored row by row, so equal numbers mean the right rows.
        stored = "F32" if values.ndim == 1 else kind
        if kind in ("F32", "F16", "BF16"):
            assert bytes(source.read(name).data) == make.quantised(make.weights[name], stored)


def test_tensors_are_writable_bytes(make: Any) -> None:
    for path in (make.directory(), make.gguf("Q4_1")):
        source = open_weights(resolve(str(path)))
        for name in ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"):
            raw = source.read(name)
            assert raw.data.format == "B"
            assert not raw.data.readonly


def test_half_split_rows_rotate_to_the_same_scores() -> None:
    """Attention scores of llama.cpp's adjacent-pair rotation equal those of the half-split one."""
    head_dim, hidden, heads = 8, 16, 2
    rng = np.random.default_rng(3)
    stored = rng.standard_normal((2, heads * head_dim, hidden)).astype(np.float32)  # q and k
    states = rng.standard_normal((2, hidden)).astype(np.float32)  # at positions 5 and 2
    angle = np.outer([5.0, 2.0], 100.0 ** (-np.arange(0, head_dim, 2) / head_dim))

    def rotated(rows: NDArray[np.float32], which: int, adjacent: bool) -> NDArray[np.float32]:
        heads_ = (rows @ states[which]).reshape(heads, head_dim)
        even, odd = (
            (heads_[:, 0::2], heads_[:, 1::2])
            if adjacent
            else (heads_[:, : head_dim // 2], heads_[:, head_dim // 2 :])
        )
        cos, sin = np.cos(angle[which]), np.sin(angle[which])
        return np.concatenate([even * cos - odd * sin, even * sin + odd * cos], axis=1)

    split = [
        half_split_rows(rows.view(np.uint8).reshape(-1), "fp32", rows.shape, head_dim)
        .view(np.float32)
        .reshape(rows.shape)
        for rows in stored
    ]
    theirs = (rotated(stored[0], 0, True) * rotated(stored[1], 1, True)).sum(axis=1)
    ours = (rotated(split[0], 0, False) * rotated(split[1], 1, False)).sum(axis=1)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    assert not np.array_equal(split[0], stored[0])


def test_biases_are_read_and_q_and_k_ones_reordered(make: Any) -> None:
    rng = np.random.default_rng(5)
    sizes = {"q_proj": 128, "k_proj": 64, "v_proj": 64, "o_proj": 64}
    biases = {
        f"model.layers.{i}.self_attn.{name}.bias": rng.standard_normal(size).astype(np.float32)
        for i in range(2)
        for name, size in sizes.items()
    }
    weights = make.weights | biases
    gguf = resolve(str(make.gguf(weights=weights)))
    directory = resolve(str(make.directory(weights=weights, config=make.config(attention_bias=True))))
    assert gguf.config.attention_bias
    assert not gguf.config.mlp_bias
    for files in (gguf, directory):
        read = all_numbers(open_weights(files))
        assert read.keys() == weights.keys()
        for name, values in biases.items():
            np.testing.assert_array_equal(read[name], values)


def test_tied_models_have_no_output_projection(make: Any) -> None:
    weights = {name: values for name, values in make.weights.items() if name != "lm_head.weight"}
    for path in (
        make.gguf(weights=weights),
        make.directory("absent", weights=weights, config=make.config(tie_word_embeddings=True)),
        make.directory("stored", config=make.config(tie_word_embeddings=True)),
    ):
        files = resolve(str(path))
        assert files.config.tie_word_embeddings
        assert "lm_head.weight" not in open_weights(files).names()


def test_missing_tensors_are_named(make: Any) -> None:
    weights = {name: values for name, values in make.weights.items() if "layers.1.mlp" not in name}
    with pytest.raises(CheckpointError, match=r"lacks the tensors model\.layers\.1\.mlp\.gate_proj"):
        resolve(str(make.directory(weights=weights)))
    with pytest.raises(CheckpointError, match=r"tiny\.gguf lacks the tensors .*down_proj\.weight"):
        resolve(str(make.gguf(weights=weights)))
    few = dict(list(make.weights.items())[:4])
    with pytest.raises(CheckpointError, match="and 14 more"):
        resolve(str(make.directory("few", weights=few)))


def test_a_missing_output_projection_suggests_a_tied_one(make: Any) -> None:
    weights = {name: values for name, values in make.weights.items() if name != "lm_head.weight"}
    with pytest.raises(CheckpointError, match=r"lacks the tensors lm_head.weight; .*set tie_word_embeddings"):
        resolve(str(make.directory(weights=weights)))


def test_tensors_of_another_shape_are_named(make: Any) -> None:
    with pytest.raises(CheckpointError, match=r"mlp\.gate_proj\.weight has shape \[96, 64\]; .* gives"):
        resolve(str(make.directory(config=make.config(intermediate_size=97))))


def test_tensors_without_a_place_are_named(make: Any) -> None:
    extra = {"model.layers.0.self_attn.q_norm.weight": np.ones(32, np.float32)}
    with pytest.raises(CheckpointError, match=r"has the tensor model.layers.0.self_attn.q_norm.weight"):
        resolve(str(make.directory(weights=make.weights | extra)))
    with pytest.raises(CheckpointError, match=r"tensor blk\.0\.attn_q_norm\.weight has no place"):
        resolve(str(make.gguf(tensors={"blk.0.attn_q_norm.weight": ((1,), 0, b"\0" * 4)})))
    tables = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(16, np.float32)}
    resolve(str(make.directory("tables", weights=make.weights | tables)))  # old checkpoints have them


def test_a_tensor_in_two_shards_is_an_error(make: Any) -> None:
    path = make.directory(num_shards=2)
    shard = next(path.glob("model-00001*"))
    shard.write_bytes(make.serialised(make.weights, "F32"))
    with pytest.raises(CheckpointError, match=r"is in .*00001-of-00002.* and in .*00002-of-00002"):
        resolve(str(path))


def test_numbers_that_cannot_be_read_are_named_before_loading(make: Any) -> None:
    path = make.directory()
    data = (path / "model.safetensors").read_bytes()
    # U32 is as wide as F32: the header stays valid.
    (path / "model.safetensors").write_bytes(data.replace(b'"F32"', b'"U32"', 1))
    with pytest.raises(CheckpointError, match="has dtype U32"):
        resolve(str(path))


def test_unknown_names_and_dummies_are_errors(make: Any) -> None:
    for path in (make.directory(), make.gguf()):
        source = open_weights(resolve(str(path)))
        for ask in (source.read, source.dtype):
            with pytest.raises(CheckpointError, match=r"no tensor lm_head.bias"):
                ask("lm_head.bias")
    with pytest.raises(CheckpointError, match="dummy:tiny has no weights on disk"):
        open_weights(resolve("dummy:tiny"))


def reference(gguf: GgufFile, name: str, data: bytes) -> NDArray[np.float64]:
    """Q4_1 or Q8_0 by definition in double precision, block by block."""
    tensor = gguf.tensors[name]
    values = []
    if tensor.ggml_type == 8:
        for block in np.frombuffer(data, np.uint8).reshape(-1, 34):
            values.append(block[2:].view(np.int8) * float(block[:2].view(np.float16)[0]))
    else:
        for block in np.frombuffer(data, np.uint8).reshape(-1, 20):
            scale, low = block[:4].view(np.float16).astype(np.float64)
            values.append(np.concatenate([block[4:] % 16, block[4:] // 16]) * scale + low)
    return np.concatenate(values).reshape(-1, tensor.shape[-1])


@pytest.mark.parametrize(
    ("name", "stored", "num_rows"),
    [
        ("model.layers.7.self_attn.q_proj.weight", "blk.7.attn_q.weight", 576),
        ("model.layers.29.self_attn.k_proj.weight", "blk.29.attn_k.weight", 192),
        ("model.layers.0.mlp.down_proj.weight", "blk.0.ffn_down.weight", 100),
        ("model.embed_tokens.weight", "token_embd.weight", 300),
    ],
)
def test_the_built_in_model_is_dequantised_as_defined(
    smollm2: ModelFiles, smollm2_gguf: ModelFiles, name: str, stored: str, num_rows: int
) -> None:
    gguf = GgufFile(smollm2_gguf.weight_files[0])
    tensor = gguf.tensors[stored]
    row_bytes = tensor.size_bytes // tensor.shape[0]
    with smollm2_gguf.weight_files[0].open("rb") as file:
        file.seek(tensor.begin)
        expected = reference(gguf, stored, file.read(row_bytes * num_rows))
    if ".q_proj." in name or ".k_proj." in name:
        # Row 2i + j of a head is number j of pair i; half-split, it is row i + 32 j.
        source = [64 * (r // 64) + 2 * (r % 32) + (r % 64) // 32 for r in range(num_rows)]
        expected = expected[source]
    exact = numbers(open_weights(smollm2_gguf).read(name))[:num_rows]
    np.testing.assert_allclose(exact, expected, rtol=1e-6, atol=1e-7)
    cached = open_weights(smollm2).read(name)
    assert cached.dtype == "bf16"
    np.testing.assert_allclose(numbers(cached)[:num_rows], expected, rtol=2**-8, atol=1e-7)


def test_the_built_in_model_has_its_published_shape(smollm2: ModelFiles, smollm2_gguf: ModelFiles) -> None:
    config = smollm2.config
    assert config == smollm2_gguf.config
    assert (config.num_layers, config.num_q_heads, config.num_kv_heads, config.head_dim) == (30, 9, 3, 64)
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (49152, 576, 1536)
    assert (config.rope_theta, config.rms_norm_eps, config.context_length) == (100000.0, 1e-5, 8192)
    assert (config.tie_word_embeddings, config.bos_token_id, config.eos_token_ids) == (True, 1, (2,))
    num_parameters = sum(int(np.prod(shape)) for shape in expected_shapes(config).values())
    assert num_parameters == 134_515_008
