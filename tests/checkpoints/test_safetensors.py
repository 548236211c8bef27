from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from diphase.checkpoints.safetensors import SafetensorsFile, TensorSpec, write_safetensors
from diphase.proto.errors import CheckpointError


def test_what_the_reference_library_wrote_is_read(make: Any, tmp_path: Path) -> None:
    values = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros((0, 4), np.float32)}
    for dtype, name in (("F32", "fp32"), ("F16", "fp16"), ("BF16", "bf16")):
        path = tmp_path / f"{dtype}.safetensors"
        path.write_bytes(make.serialised(values, dtype))
        file = SafetensorsFile(path)
        for key, value in values.items():
            assert file.dtype(key) == name
            assert file.entries[key].shape == value.shape
            assert bytes(file.read(key)) == make.quantised(value, dtype)


def test_what_is_written_the_reference_library_reads(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {
        "half": rng.standard_normal((5, 7)).astype(np.float16),
        "single": rng.standard_normal((3,)).astype(np.float32),
    }
    specs = {"half": TensorSpec("fp16", (5, 7)), "single": TensorSpec("fp32", (3,))}
    done: list[int] = []
    path = tmp_path / "out.safetensors"
    write_safetensors(
        path, specs, lambda name: memoryview(arrays[name].reshape(-1).view(np.uint8)), done.append
    )
    read = safetensors.numpy.load_file(path)
    assert {name: value.tolist() for name, value in read.items()} == {
        n: a.tolist() for n, a in arrays.items()
    }
    assert done == [70, 82]
    assert SafetensorsFile(path).header_bytes % 8 == 0


def test_a_producer_that_gives_other_bytes_than_announced_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="t: 3 bytes given, 8 announced"):
        write_safetensors(
            tmp_path / "x", {"t": TensorSpec("fp32", (2,))}, lambda _: memoryview(b"abc"), lambda _: None
        )


def test_what_was_read_may_be_written_and_the_file_stays(make: Any, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(make.serialised({"t": np.ones(4, np.float32)}, "F32"))
    before = path.read_bytes()
    SafetensorsFile(path).read("t")[:4] = b"\0\0\0\0"
    assert path.read_bytes() == before


def test_another_number_format_is_named_when_it_is_wanted(tmp_path: Path) -> None:
    path = tmp_path / "int.safetensors"
    safetensors.numpy.save_file({"ids": np.arange(3, dtype=np.int64)}, path)
    with pytest.raises(CheckpointError, match=r"tensor ids has dtype I64.*use BF16, F16 or F32"):
        SafetensorsFile(path).dtype("ids")


def entry(begin: int, end: int, dtype: str = "F32", shape: Any = (1,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": entry(0, 4), "b": entry(8, 12)}, 12, "the data of b begin"),
        ({"a": entry(0, 4), "b": entry(0, 4)}, 4, "the data of b begin"),
        ({"a": entry(0, 4)}, 3, r"truncated.*download it again"),
        ({"a": entry(0, 4)}, 5, "1 bytes follow"),
        ({"a": entry(0, 8)}, 8, "a has shape"),
        ({"a": entry(4, 0)}, 4, "the entry of a"),
        ({"a": entry(0, 4, shape=(-1,))}, 4, "the entry of a"),
        ({"a": entry(0, 4, shape=("1",))}, 4, "the entry of a"),
        ({"a": {"dtype": "F32"}}, 4, "the entry of a"),
        ({"a": 5}, 4, "the entry of a"),
        ({"a": {"dtype": 3, "shape": [1], "data_offsets": [0, 4]}}, 4, "the entry of a"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}, 4, "the entry of a"),
        ({"a": entry(0, 4, shape=(2**63,))}, 4, "the entry of a"),
        ({"a": entry(10**4300 - 1, 10**4300 - 1, shape=(0,))}, 0, "the entry of a"),
        ({"a": entry(0, 4, shape=[1] * 9)}, 4, "the entry of a"),
        ([], 0, "no JSON object"),
    ],
)
def test_malformed_headers_are_errors(tmp_path: Path, header: Any, data: int, message: str) -> None:
    encoded = json.dumps(header).encode()
    path = tmp_path / "bad.safetensors"
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + b"\0" * data)
    with pytest.raises(CheckpointError, match=message):
        SafetensorsFile(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be opened"),
        (b"\1\0", "header would be"),
        ((2**40).to_bytes(8, "little") + b"{}", "header would be"),
        ((2).to_bytes(8, "little") + b"{x", "no JSON"),
        ((2).to_bytes(8, "little") + b"\xff\xfe", "no JSON"),
        ((10**5).to_bytes(8, "little") + b"[" * 10**5, "no JSON"),
        ((10**4).to_bytes(8, "little") + b"9" * 10**4, "no JSON"),
    ],
)
def test_files_that_are_no_safetensors_are_errors(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        SafetensorsFile(path)
