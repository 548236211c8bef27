from __future__ import annotations

import json
import os
from typing import Any

import numpy as np
import pytest
from diphase.checkpoints.lookup import resolve
from diphase.proto.errors import CheckpointError


def test_all_missing_files_are_named_at_once(make: Any) -> None:
    path = make.folder / "empty"
    path.mkdir()
    with pytest.raises(CheckpointError, match=r"lacks config\.json, tokenizer\.json, model\.safetensors \("):
        resolve(str(path))


@pytest.mark.parametrize(
    ("removed", "added", "message"),
    [
        ("tokenizer.json", "tokenizer.model", "lacks tokenizer.json; save tokenizer.json from"),
        ("model.safetensors", "pytorch_model.bin", "convert its PyTorch weights"),
        ("model.safetensors", "model-q4.gguf", "or name the file .*model-q4.gguf itself"),
    ],
)
def test_a_directory_of_another_kind_gets_a_hint(make: Any, removed: str, added: str, message: str) -> None:
    path = make.directory()
    (path / removed).unlink()
    (path / added).write_bytes(b"")
    with pytest.raises(CheckpointError, match=message):
        resolve(str(path))


def test_missing_shards_are_named(make: Any) -> None:
    path = make.directory(num_shards=3)
    (path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks model-00002-of-00003\.safetensors, which"):
        resolve(str(path))


def test_shards_without_an_index_are_all_read(make: Any) -> None:
    path = make.directory(num_shards=3)
    (path / "model.safetensors.index.json").unlink()
    assert len(resolve(str(path)).weight_files) == 3


def test_other_copies_of_the_weights_beside_the_standard_file_are_not_read(make: Any) -> None:
    path = make.directory()
    (path / "consolidated.safetensors").write_bytes(b"another layout")
    assert [file.name for file in resolve(str(path)).weight_files] == ["model.safetensors"]


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{}", "lacks weight_map"),
        ('{"weight_map": []}', "lacks weight_map"),
        ('{"weight_map": {"a": "../elsewhere.safetensors"}}', "is no file beside it"),
        ("[1]", "must hold a JSON object, not a list"),
        ("{", "cannot be read as JSON"),
        ("[" * 10**5, "cannot be read as JSON"),
        ("9" * 10**4, "cannot be read as JSON"),
        ('{"weight_map": {"a": ' + "[" * 980 + "]" * 980 + "}}", r"names .*, which is no file|read as JSON"),
        ('{"weight_map": {"a": 5}}', "names 5, which is no file beside it"),
        ('{"weight_map": {"a": "' + "x" * 300 + '"}}', "cannot be read: .*name too long"),
    ],
)
def test_a_senseless_index_is_an_error(make: Any, index: str, message: str) -> None:
    path = make.directory()
    (path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=message):
        resolve(str(path))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(make: Any, name: str) -> None:
    path = make.directory()
    (path / name).unlink()
    os.mkfifo(path / name)
    with pytest.raises(CheckpointError, match=rf"lacks {name}|{name} cannot be opened: .*no regular file"):
        resolve(str(path))


def test_a_config_that_is_no_text_is_an_error(make: Any) -> None:
    path = make.directory()
    (path / "config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read as text"):
        resolve(str(path))


@pytest.mark.parametrize("eos", ["<|im_end|>", {"content": "<|im_end|>", "special": True}])
def test_the_tokenizers_end_of_turn_ends_the_output_too(make: Any, eos: Any) -> None:
    files = {"tokenizer_config.json": {"eos_token": eos}, "generation_config.json": {"eos_token_id": 7}}
    path = make.directory(config=make.config(eos_token_id=9), files=files)
    assert resolve(str(path)).config.eos_token_ids == (7, 9, 1)


def test_an_end_of_turn_that_the_tokenizer_does_not_have_is_ignored(make: Any) -> None:
    path = make.directory(files={"tokenizer_config.json": {"eos_token": "<none>"}})
    assert resolve(str(path)).config.eos_token_ids == (1,)


def test_the_fingerprint_names_content_not_place(make: Any) -> None:
    first, copy = make.directory("first"), make.directory("copy")
    assert resolve(str(first)).fingerprint == resolve(str(copy)).fingerprint
    assert len(resolve(str(first)).fingerprint) == 16


def test_the_fingerprint_tells_fine_tunes_of_one_shape_apart(make: Any) -> None:
    tuned = {name: values + np.float32(0.5) for name, values in make.weights.items()}
    fingerprints = {
        resolve(str(make.directory("base"))).fingerprint,
        resolve(str(make.directory("tuned", weights=tuned))).fingerprint,
        resolve(str(make.directory("theta", config=make.config(rope_theta=1e6)))).fingerprint,
        resolve(str(make.directory("half", dtype="F16"))).fingerprint,
    }
    assert len(fingerprints) == 4


def test_files_can_be_sent_to_another_process(make: Any) -> None:
    import pickle

    files = resolve(str(make.directory()))
    assert pickle.loads(pickle.dumps(files)) == files
    assert json.loads(files.config.to_json())["model_type"] == "llama"
