"""The cache of converted models: a quantised GGUF file once made into a bf16 model directory.

Conversion is atomic and happens once, however many processes want it: a file lock admits one, which writes
into a temporary directory beside the final one and renames it. What a killed process left behind is removed
by the next one that has the lock.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ..proto.errors import CheckpointError
from . import directory
from .chat_template import gguf_template
from .gguf import GgufFile
from .gguf_llama import files_from_gguf
from .gguf_tokenizer import build_tokenizer, special_tokens
from .model_files import ModelFiles, Progress
from .number_formats import bf16_from_fp32
from .safetensors import TensorSpec, write_safetensors
from .weights import RawTensor, expected_shapes, open_weights

FORMAT_VERSION = 1
"""Part of the directory's name; raised when what is written changes."""
LOCK_DEADLINE_S = 600.0
_LOCK_POLL_S = 0.05


def default_cache() -> Path:
    """$DIPHASE_CACHE, else ~/.cache/diphase."""
    return Path(os.environ.get("DIPHASE_CACHE") or Path.home() / ".cache" / "diphase")


def converted_directory(gguf_path: Path, label: str, cache: Path, progress: Progress) -> Path:
    """The bf16 model directory made of a .gguf file, converting it when it is not in the cache yet.

    Args:
        label: begins the directory's name, for people who look into the cache.

    Raises:
        CheckpointError: the file cannot be read, the cache cannot be written, or another process has been
            converting for longer than LOCK_DEADLINE_S.
    """
    source = files_from_gguf(gguf_path, label)
    target = cache / "converted" / f"{label}-{source.fingerprint}-v{FORMAT_VERSION}"
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.with_name(target.name + ".lock"), lambda: progress(f"waiting for {label}", 0.0)):
            if not target.is_dir():
                _convert(source, target, progress)
    except OSError as error:
        raise CheckpointError(
            f"{label} cannot be converted into the cache {cache}: {error}; "
            "make room there, or set DIPHASE_CACHE to a directory that can be written"
        ) from error
    return target


@contextmanager
def _locked(path: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Holds an exclusive lock on a file; the system lets go of it when the process ends, however it ends."""
    deadline = time.monotonic() + LOCK_DEADLINE_S
    waiting = False
    with path.open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise CheckpointError(
                        f"another process has held {path} for {LOCK_DEADLINE_S:.0f} s; end it and try again"
                    ) from None
                if not waiting:
                    on_wait()
                    waiting = True
                time.sleep(_LOCK_POLL_S)
        yield


def _convert(source: ModelFiles, target: Path, progress: Progress) -> None:
    """With the lock held: writes everything beside the target, then renames."""
    prefix = f"{target.name}.tmp-"
    for stale in target.parent.glob(f"{prefix}*"):
        shutil.rmtree(stale)
    temporary = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    try:
        _write_vocabulary(source, temporary)
        _write_weights(source, temporary / directory.SINGLE_SHARD, progress)
        temporary.chmod(0o755)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # after the rename nothing is there


def _write_vocabulary(source: ModelFiles, path: Path) -> None:
    gguf = GgufFile(source.weight_files[0])
    tokenizer_config: dict[str, object] = {**special_tokens(gguf)}
    if (template := gguf_template(gguf)) is not None:
        tokenizer_config["chat_template"] = template
    (path / directory.CONFIG).write_text(source.config.to_json(), encoding="utf-8")
    build_tokenizer(gguf).save(str(path / directory.TOKENIZER))
    (path / directory.TOKENIZER_CONFIG).write_text(json.dumps(tokenizer_config, indent=2), encoding="utf-8")


def _write_weights(source: ModelFiles, path: Path, progress: Progress) -> None:
    weights = open_weights(source)
    specs = {name: TensorSpec("bf16", shape) for name, shape in expected_shapes(source.config).items()}
    total = sum(spec.size_bytes for spec in specs.values())
    stage = f"converting {source.name} to bf16"
    progress(stage, 0.0)
    write_safetensors(
        path, specs, lambda name: _as_bf16(weights.read(name)), lambda done: progress(stage, done / total)
    )


def _as_bf16(tensor: RawTensor) -> memoryview:
    """The tensor's numbers rounded to bf16, as bytes."""
    match tensor.dtype:
        case "bf16":
            return tensor.data
        case "fp16":
            values = np.frombuffer(tensor.data, np.float16).astype(np.float32)
        case _:
            values = np.frombuffer(tensor.data, np.float32)
    return bf16_from_fp32(values).view(np.uint8).data
