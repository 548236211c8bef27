from __future__ import annotations

import fcntl
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diphase.checkpoints import conversion
from diphase.checkpoints.chat_template import load_chat_template
from diphase.checkpoints.conversion import converted_directory, default_cache
from diphase.checkpoints.lookup import resolve
from diphase.checkpoints.number_formats import bf16_from_fp32
from diphase.checkpoints.tokenizer import load_tokenizer
from diphase.checkpoints.weights import open_weights
from diphase.proto.errors import CheckpointError


def quiet(_stage: str, _share: float) -> None:
    pass


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_1"])
def test_a_converted_model_is_the_same_model_in_bf16(make: Any, tmp_path: Path, kind: str) -> None:
    path = make.gguf(kind)
    original = resolve(str(path))
    converted = resolve(str(converted_directory(path, "tiny", tmp_path / "cache", quiet)))
    assert converted.config == original.config
    before, after = open_weights(original), open_weights(converted)
    for name in before.names():
        raw = before.read(name)
        if raw.dtype == "bf16":
            expected = bytes(raw.data)
        else:
            dtype = np.float16 if raw.dtype == "fp16" else np.float32
            expected = bf16_from_fp32(np.frombuffer(raw.data, dtype).astype(np.float32)).tobytes()
        assert after.dtype(name) == "bf16"
        assert bytes(after.read(name).data) == expected
    for text in ("the weather in 1234", "<|im_end|> tööl <tool>"):
        assert load_tokenizer(converted).encode(text, True) == load_tokenizer(original).encode(text, True)
    messages = [{"role": "user", "content": "hi"}]
    prompt = load_chat_template(original).render(messages)
    assert load_chat_template(converted).render(messages) == prompt == "<|im_start|>user:hi"


def test_progress_rises_from_nothing_to_all(make: Any, tmp_path: Path) -> None:
    reports: list[tuple[str, float]] = []
    converted_directory(make.gguf(), "tiny", tmp_path, lambda stage, share: reports.append((stage, share)))
    assert {stage for stage, _ in reports} == {"converting tiny to bf16"}
    shares = [share for _, share in reports]
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0.0, 1.0)


def test_conversion_happens_once(make: Any, tmp_path: Path) -> None:
    path = make.gguf()
    first = converted_directory(path, "tiny", tmp_path, quiet)
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    reports: list[str] = []
    assert converted_directory(path, "tiny", tmp_path, lambda stage, _: reports.append(stage)) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == stamp
    assert reports == []


def test_other_weights_get_another_directory(make: Any, tmp_path: Path) -> None:
    other = {name: values * 2 for name, values in make.weights.items()}
    first = converted_directory(make.gguf(), "tiny", tmp_path, quiet)
    second = converted_directory(make.gguf(name="other.gguf", weights=other), "tiny", tmp_path, quiet)
    assert first != second


def test_processes_that_want_it_at_once_convert_it_once(make: Any, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from diphase.checkpoints.conversion import converted_directory\n"
        "sys.stdin.readline()\n"
        "stages = []\n"
        f"converted_directory(Path({str(make.gguf())!r}), 'tiny', Path({str(tmp_path / 'cache')!r}),"
        " lambda stage, share: stages.append(stage))\n"
        "print('converting tiny to bf16' in stages)"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-P", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert sorted(outputs) == ["False\n", "False\n", "True\n"]
    left = sorted(path.name for path in (tmp_path / "cache" / "converted").iterdir())
    assert len(left) == 2  # the directory and its lock


def test_what_a_killed_process_left_is_removed(make: Any, tmp_path: Path) -> None:
    path = make.gguf()
    target = converted_directory(path, "tiny", tmp_path, quiet)
    stale = target.with_name(target.name + ".tmp-killed")
    target.rename(stale)
    (stale / "model.safetensors").write_bytes(b"half")
    assert resolve(str(converted_directory(path, "tiny", tmp_path, quiet))).config.num_layers == 2
    assert not stale.exists()


def test_a_failed_conversion_leaves_nothing(make: Any, tmp_path: Path) -> None:
    def interrupted(_stage: str, share: float) -> None:
        if share > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        converted_directory(make.gguf(), "tiny", tmp_path / "cache", interrupted)
    assert [path.suffix for path in (tmp_path / "cache" / "converted").iterdir()] == [".lock"]


def test_a_cache_that_cannot_be_written_is_an_error(make: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"cannot be converted into the cache .*set DIPHASE_CACHE"):
        converted_directory(make.gguf(), "tiny", tmp_path / "file", quiet)


def test_a_lock_that_is_never_released_is_an_error_in_the_end(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make.gguf()
    target = converted_directory(path, "tiny", tmp_path, quiet)
    target.rename(tmp_path / "away")
    monkeypatch.setattr(conversion, "LOCK_DEADLINE_S", 0.0)
    stages: list[str] = []
    with target.with_name(target.name + ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match=r"another process has held .*\.lock for 0 s"):
            converted_directory(path, "tiny", tmp_path, lambda stage, _: stages.append(stage))


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIPHASE_CACHE", "/somewhere")
    assert default_cache() == Path("/somewhere")
    monkeypatch.setenv("DIPHASE_CACHE", "")
    monkeypatch.setenv("HOME", "/home/someone")
    assert default_cache() == Path("/home/someone/.cache/diphase")
