"""A model's weights as bytes under their Hugging Face names, whatever file they come from.

No torch: an engine turns `RawTensor.data` into a tensor with torch.frombuffer, without a copy. All buffers
are writable, and writing to them changes no file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ..proto.errors import CheckpointError
from .gguf import GgufFile
from .gguf_llama import half_split_rows, tensor_names
from .model_config import ModelConfig
from .model_files import ModelFiles, ModelKind
from .safetensors import SafetensorsFile

_MAX_NAMED = 3
"""Missing tensors that an error message names."""


@dataclass(frozen=True, slots=True)
class RawTensor:
    dtype: str
    """bf16, fp16 or fp32."""
    shape: tuple[int, ...]
    data: memoryview
    """Row-major bytes, writable; keeps what it lies in alive."""


class WeightSource(Protocol):
    """Open weights. Safe to read from several threads."""

    def names(self) -> Sequence[str]:
        """Hugging Face names of the tensors that the model needs, in the order of the layers."""
        ...

    def dtype(self, name: str) -> str:
        """What read(name) will give: bf16, fp16 or fp32."""
        ...

    def read(self, name: str) -> RawTensor:
        """One tensor; from safetensors mapped, from a quantised GGUF dequantised anew at each call.

        Raises:
            CheckpointError: the model has no tensor of that name.
        """
        ...


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all weights of a model, in the order of the layers; biases and lm_head only where
    the configuration has them. A dummy model's weights are drawn for exactly these."""
    hidden, mlp = config.hidden_size, config.intermediate_size
    q, kv = config.num_q_heads * config.head_dim, config.num_kv_heads * config.head_dim
    attention = {"q_proj": (q, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, q)}
    gated = {"gate_proj": (mlp, hidden), "up_proj": (mlp, hidden), "down_proj": (hidden, mlp)}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for i in range(config.num_layers):
        layer = f"model.layers.{i}"
        shapes[f"{layer}.input_layernorm.weight"] = (hidden,)
        for group, projections, biased in (
            ("self_attn", attention, config.attention_bias),
            ("mlp", gated, config.mlp_bias),
        ):
            for name, shape in projections.items():
                shapes[f"{layer}.{group}.{name}.weight"] = shape
                if biased:
                    shapes[f"{layer}.{group}.{name}.bias"] = shape[:1]
        shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def open_weights(files: ModelFiles) -> WeightSource:
    """Opens the weights and checks that all are there with the shapes that the configuration gives.

    Raises:
        CheckpointError: a file is damaged; a tensor lacks, has another shape, or cannot be read; or the
            model is a dummy, whose weights exist nowhere.
    """
    if files.is_dummy:
        raise CheckpointError(f"{files.name} has no weights on disk: draw them from its config and seed")
    shapes = expected_shapes(files.config)
    if files.kind is ModelKind.GGUF:
        return _GgufWeights(GgufFile(files.weight_files[0]), shapes, files.config)
    return _SafetensorsWeights([SafetensorsFile(path) for path in files.weight_files], shapes)


class _SafetensorsWeights:
    def __init__(self, shards: Sequence[SafetensorsFile], shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._shard_of: dict[str, SafetensorsFile] = {}
        for shard in shards:
            for name in shard.entries:
                if name in self._shard_of:
                    raise CheckpointError(
                        f"tensor {name} is in {self._shard_of[name].path} and in {shard.path}"
                    )
                self._shard_of[name] = shard
        self._shapes = shapes
        found = {name: shard.entries[name].shape for name, shard in self._shard_of.items()}
        _check(found, shapes, shards[0].path.parent)
        for name in shapes:
            self._shard_of[name].dtype(name)

    def names(self) -> Sequence[str]:
        return tuple(self._shapes)

    def dtype(self, name: str) -> str:
        return self._shard_of[_known(name, self._shapes)].dtype(name)

    def read(self, name: str) -> RawTensor:
        shard = self._shard_of[_known(name, self._shapes)]
        return RawTensor(shard.dtype(name), self._shapes[name], shard.read(name))


class _GgufWeights:
    def __init__(self, gguf: GgufFile, shapes: Mapping[str, tuple[int, ...]], config: ModelConfig) -> None:
        self._gguf = gguf
        self._names = tensor_names(gguf)
        self._shapes = shapes
        self._head_dim = config.head_dim
        _check({name: gguf.tensors[stored].shape for name, stored in self._names.items()}, shapes, gguf.path)

    def names(self) -> Sequence[str]:
        return tuple(self._shapes)

    def dtype(self, name: str) -> str:
        return self._gguf.tensors[self._names[_known(name, self._shapes)]].dtype

    def read(self, name: str) -> RawTensor:
        dtype, shape = self.dtype(name), self._shapes[name]
        data = self._gguf.read(self._names[name])
        if ".q_proj." in name or ".k_proj." in name:
            data = half_split_rows(data, dtype, shape, self._head_dim)
        return RawTensor(dtype, shape, data.data)


def _known(name: str, shapes: Mapping[str, tuple[int, ...]]) -> str:
    if name not in shapes:
        raise CheckpointError(f"the model has no tensor {name}")
    return name


def _check(found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]], where: Path) -> None:
    missing = [name for name in wanted if name not in found]
    if missing:
        more = f" and {len(missing) - _MAX_NAMED} more" if len(missing) > _MAX_NAMED else ""
        hint = (
            "; if the embedding serves as output, set tie_word_embeddings"
            if missing == ["lm_head.weight"]
            else ""
        )
        raise CheckpointError(f"{where} lacks the tensors {', '.join(missing[:_MAX_NAMED])}{more}{hint}")
    for name, shape in wanted.items():
        if found[name] != shape:
            raise CheckpointError(
                f"{where}: tensor {name} has shape {list(found[name])}; the configuration gives {list(shape)}"
            )
    surplus = [name for name in found if name not in wanted and not _is_redundant(name)]
    if surplus:
        raise CheckpointError(
            f"{where} has the tensor {surplus[0]}, which has no place in the model of its configuration"
        )


def _is_redundant(name: str) -> bool:
    """Whether a surplus tensor carries nothing: a tied output projection, or a table that theta
    determines."""
    return name == "lm_head.weight" or name.endswith(".rotary_emb.inv_freq")
