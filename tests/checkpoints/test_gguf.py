from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diphase.checkpoints.gguf import GgufFile
from diphase.proto.errors import CheckpointError


def test_every_kind_of_metadata_is_read(make: Any) -> None:
    metadata = {
        "u8": np.uint8(200),
        "i8": np.int8(-5),
        "u16": np.uint16(60000),
        "i16": np.int16(-300),
        "u32": 7,
        "i32": np.int32(-70000),
        "f32": 1e-5,
        "bool": True,
        "text": "ä text",
        "u64": np.uint64(2**40),
        "i64": np.int64(-(2**40)),
        "f64": np.float64(0.1),
        "texts": ["a", "", "ü"],
        "ints": np.array([1, -2, 3], np.int32),
        "floats": np.array([0.5, -1.0], np.float32),
    }
    read = GgufFile(make.raw_gguf(metadata)).metadata
    assert read == {
        **{key: value for key, value in metadata.items() if not isinstance(value, np.ndarray)},
        "ints": [1, -2, 3],
        "floats": [0.5, -1.0],
    }
    assert read["f32"] == 1e-5  # the decimal, not its nearest 32-bit number
    assert read["bool"] is True


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_plain_tensors_are_mapped_as_they_are(make: Any, kind: str) -> None:
    values = np.random.default_rng(0).standard_normal((3, 32)).astype(np.float32)
    number = {"F32": 0, "F16": 1, "BF16": 30}[kind]
    data = make.quantised(values, kind)
    gguf = GgufFile(make.raw_gguf({}, other=((1,), 0, b"\0" * 4), t=((3, 32), number, data)))
    assert gguf.tensors["t"].shape == (3, 32)
    assert gguf.tensors["t"].dtype == {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}[kind]
    assert gguf.read("t").tobytes() == data


def test_what_was_read_may_be_written_and_the_file_stays(make: Any) -> None:
    path = make.raw_gguf({}, t=((4,), 0, np.ones(4, np.float32).tobytes()))
    before = path.read_bytes()
    GgufFile(path).read("t")[:] = 0
    assert path.read_bytes() == before


def test_tensors_start_at_the_files_own_alignment(make: Any) -> None:
    path = make.raw_gguf({"general.alignment": 32, "pad": "x" * 17}, t=((2,), 0, struct.pack("<ff", 1, 2)))
    assert GgufFile(path).read("t").view(np.float32).tolist() == [1.0, 2.0]


def test_version_2_is_read(make: Any) -> None:
    assert GgufFile(make.raw_gguf({"key": 1}, version=2)).metadata == {"key": 1}


@pytest.mark.parametrize(("number", "name"), [(12, "Q4_K"), (14, "Q6_K"), (23, "IQ4_XS"), (99, "number 99")])
def test_another_tensor_type_is_named_with_its_tensor(make: Any, number: int, name: str) -> None:
    path = make.raw_gguf({}, **{"blk.0.attn_q.weight": ((256,), number, b"\0" * 256)})
    with pytest.raises(CheckpointError, match=rf"blk\.0\.attn_q\.weight has type {name},.*use a file.*Q4_1"):
        GgufFile(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be opened"),
        (b"PK\x03\x04" + b"\0" * 40, "not a GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 2**60), "truncated or damaged"),
        (
            b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q1sI", 1, b"k", 77),
            "unknown kind of value 77",
        ),
        (
            b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q1sIIQ", 1, b"k", 9, 9, 1),
            "kind of array 9",
        ),
        (
            b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q1sIIQ", 1, b"k", 9, 8, 2**50),
            "an array of 1125899906842624 values",
        ),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q1s", 1, b"\xff") + b"\0" * 20, "damaged"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + struct.pack("<Q1sI", 1, b"t", 9), "9 dimensions"),
    ],
)
def test_damaged_files_are_errors(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        GgufFile(path)


def test_a_file_cut_anywhere_is_an_error(make: Any) -> None:
    path = make.raw_gguf({"text": "abc", "list": ["a", "b"]}, t=((32,), 8, b"\1" * 34))
    whole = path.read_bytes()
    data_end = len(whole) - len(whole) % 32 + 2 if len(whole) % 32 else len(whole) - 30
    for length in range(data_end):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            GgufFile(path)
    path.write_bytes(whole[:data_end])
    assert GgufFile(path).read("t").size == 128


def test_rows_that_are_no_whole_blocks_are_an_error(make: Any) -> None:
    with pytest.raises(CheckpointError, match="rows of t have 33 numbers"):
        GgufFile(make.raw_gguf({}, t=((33,), 8, b"\0" * 68)))


def test_an_array_that_would_fill_the_memory_is_an_error_even_where_it_fits(make: Any) -> None:
    path = make.raw_gguf({"list": np.zeros(0, np.uint8)})
    count = 2**24 + 1
    path.write_bytes(
        path.read_bytes().replace(struct.pack("<IIQ", 9, 0, 0), struct.pack("<IIQ", 9, 0, count))
    )
    with path.open("r+b") as file:
        file.truncate(2 * count)  # a hole: the file takes no room
    with pytest.raises(CheckpointError, match=f"an array of {count} values"):
        GgufFile(path)


def test_the_name_of_a_tensor_has_a_limit(make: Any) -> None:
    assert "t" * 256 in GgufFile(make.raw_gguf({}, **{"t" * 256: ((1,), 0, b"\0" * 4)})).tensors
    with pytest.raises(CheckpointError, match="a tensor's name has 257 characters"):
        GgufFile(make.raw_gguf({}, **{"t" * 257: ((1,), 0, b"\0" * 4)}))


@pytest.mark.parametrize("alignment", [0, "32"])
def test_a_senseless_alignment_is_an_error(make: Any, alignment: Any) -> None:
    with pytest.raises(CheckpointError, match="alignment"):
        GgufFile(make.raw_gguf({"general.alignment": alignment}))


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be opened"):
        GgufFile(tmp_path / "absent.gguf")
