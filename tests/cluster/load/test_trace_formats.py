"""What a file of requests says, and how a malformed one is told: by file, line and field."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from diphase.cluster.load.trace_formats import MAX_TOKENS, TraceRecord, read_trace
from diphase.proto.errors import ConfigError
from hypothesis import example, given, settings
from hypothesis import strategies as st

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens\r
2023-11-16 18:15:50.9951690,396,109\r
2023-11-16 18:15:46.6805900,374,44\r
2023-11-16 18:15:51.2224670,879,55\r
"""
MOONCAKE = """{"timestamp": 0, "input_length": 1000, "output_length": 5, "hash_ids": [0, 1]}

{"timestamp": 3000, "input_length": 700, "output_length": 7, "hash_ids": [0, 2]}
"""
HEADER = "timestamp,input_length,output_length\n"


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, newline="", encoding="utf-8")
    return path


def test_azure_rows_come_in_order_of_time_since_the_first(tmp_path: Path) -> None:
    records = read_trace(write(tmp_path, "a.csv", AZURE), sort=True)
    assert [(r.input_tokens, r.output_tokens) for r in records] == [(374, 44), (396, 109), (879, 55)]
    assert [r.arrival_s for r in records] == pytest.approx([0.0, 4.314579, 4.541877])
    assert all(r.hash_ids == () for r in records)


def test_mooncake_lines_keep_their_hash_ids_and_become_seconds(tmp_path: Path) -> None:
    assert read_trace(write(tmp_path, "m.jsonl", MOONCAKE)) == [
        TraceRecord(arrival_s=0.0, input_tokens=1000, output_tokens=5, hash_ids=(0, 1)),
        TraceRecord(arrival_s=3.0, input_tokens=700, output_tokens=7, hash_ids=(0, 2)),
    ]


@pytest.mark.parametrize(
    "row", ["2023-11-16 18:15:46,many,1", "yesterday,1,1", "2023-11-16 18:15:46,5", "2023-11-16 18:15:46,5,"]
)
def test_a_malformed_azure_row_is_named_by_its_line(tmp_path: Path, row: str) -> None:
    path = write(tmp_path, "a.csv", AZURE + row + "\r\n")
    with pytest.raises(ConfigError, match=r"a\.csv, line 5 is malformed"):
        read_trace(path, sort=True)


def test_a_csv_with_other_columns_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no 'TIMESTAMP'"):
        read_trace(write(tmp_path, "a.csv", "time,in,out\n1,2,3\n"))


@pytest.mark.parametrize(
    "line",
    ["not json", '{"timestamp": 1}', "[1]", '{"timestamp": 0, "input_length": "x", "output_length": 1}'],
)
def test_a_malformed_mooncake_line_is_named(tmp_path: Path, line: str) -> None:
    with pytest.raises(ConfigError, match=r"m\.jsonl, line 4 is malformed"):
        read_trace(write(tmp_path, "m.jsonl", MOONCAKE + line + "\n"))


@pytest.mark.parametrize("name", ["a.csv", "m.jsonl"])
def test_an_empty_trace_is_refused(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, name, "TIMESTAMP,ContextTokens,GeneratedTokens\n" if name == "a.csv" else "")
    with pytest.raises(ConfigError, match="has no requests"):
        read_trace(path)


def test_both_formats_may_have_the_names_of_either(tmp_path: Path) -> None:
    wanted = [
        TraceRecord(arrival_s=0.0, input_tokens=600, output_tokens=5, hash_ids=(3, 4)),
        TraceRecord(arrival_s=0.25, input_tokens=7, output_tokens=9),
    ]
    text = """timestamp,input_length,output_length,hash_ids\n1000,600,5,"[3, 4]"\n1250.0,7,9,[]\n"""
    assert read_trace(write(tmp_path, "own.csv", text)) == wanted
    rows: list[dict[str, Any]] = [
        {"TIMESTAMP": "2026-01-01T00:00:00Z", "ContextTokens": 600, "GeneratedTokens": 5},
        {"TIMESTAMP": "2026-01-01T01:00:00.25+01:00", "ContextTokens": 7, "GeneratedTokens": 9},
    ]
    lines = "\n".join(map(json.dumps, rows))
    found = read_trace(write(tmp_path, "own.jsonl", lines))
    assert [(r.arrival_s, r.input_tokens, r.output_tokens) for r in found] == [(0.0, 600, 5), (0.25, 7, 9)]


def test_a_file_without_a_suffix_is_told_by_its_first_character(tmp_path: Path) -> None:
    assert read_trace(write(tmp_path, "json", MOONCAKE)) == read_trace(write(tmp_path, "m.jsonl", MOONCAKE))
    assert len(read_trace(write(tmp_path, "csv", HEADER + "0,1,1\n"))) == 1


def test_hash_ids_may_be_left_out_of_a_whole_file_but_not_of_a_row(tmp_path: Path) -> None:
    bare = {"timestamp": 0, "input_length": 7, "output_length": 1}
    assert read_trace(write(tmp_path, "a.jsonl", json.dumps(bare)))[0].hash_ids == ()
    rows = f"{json.dumps({**bare, 'hash_ids': [1]})}\n{json.dumps(bare)}"
    with pytest.raises(ConfigError, match=r"line 2 is malformed: no 'hash_ids'"):
        read_trace(write(tmp_path, "b.jsonl", rows))


def test_lengths_alone_have_no_time(tmp_path: Path) -> None:
    text = "num_prefill_tokens,num_decode_tokens,num_total_tokens,pd_ratio\n74,918,992,0.08\n"
    assert read_trace(write(tmp_path, "a.csv", text)) == [
        TraceRecord(arrival_s=None, input_tokens=74, output_tokens=918)
    ]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("timestamp,input_length\n0,1\n", "line 1 is malformed: no 'output_length'; every row needs one"),
        ("timestamp,input_length,output_length,user\n", "line 1 is malformed: unknown 'user'; take out"),
        ("timestamp,timestamp,input_length\n", "line 1 is malformed: a column stands twice"),
        (HEADER + "0,1,1\n\n5,1\n", "line 4 is malformed: no 'output_length'"),
        (HEADER + "0,1,1\n,1,1\n", "line 3 is malformed: no 'timestamp'"),
        (HEADER + "0,1,1,1\n", "line 2 is malformed: 4 values for 3 columns"),
        (HEADER + "0,-1,1\n", "line 2 is malformed: input_length = -1; write a whole number"),
        (HEADER + "0,1,0\n", "line 2 is malformed: output_length = 0; write a whole number"),
        (HEADER + "0,1,many\n", "line 2 is malformed: output_length = 'many'; write a whole number"),
        (HEADER + "0,1.5,1\n", r"input_length = '1\.5'; write a whole number"),
        (HEADER + f"0,{MAX_TOKENS + 1},1\n", "input_length = 1000000001; write a whole number"),
        (HEADER + "nan,1,1\n", "line 2 is malformed: timestamp = nan is no time in milliseconds"),
        (HEADER + "inf,1,1\n", "timestamp = inf is no time"),
        (HEADER + "1e300,1,1\n", r"timestamp = 1e\+300 is no time"),
        (HEADER + "noon,1,1\n", "timestamp = 'noon' is no time"),
        (HEADER + "9,1,1\n8,1,1\n", "line 3 is malformed: timestamp = '8' is before that of the row above"),
        (HEADER + '0,1,"1\n', "output_length = '1"),
        (HEADER.replace("\n", ",hash_ids\n") + "0,1,1,[-1]\n", "hash_ids has -1 to -1; use numbers from 0"),
        (HEADER.replace("\n", ",hash_ids\n") + "0,1,1,[a]\n", r"hash_ids = '\[a\]' is no list"),
        (HEADER.replace("\n", ",hash_ids\n") + '0,1,1,"[1, 2]"\n', "hash_ids names 2 blocks of 512 tokens"),
    ],
)
def test_a_wrong_value_in_a_csv_is_told_by_line_and_field(tmp_path: Path, text: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        read_trace(write(tmp_path, "own.csv", text))


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ('{"timestamp": 0, "input_length": 7, "outp', "line 1 is malformed: no JSON object"),
        ("[" * 100_000, "line 1 is malformed: no JSON object"),
        ('[{"timestamp": 0}]', "is no JSON object; write one object a line"),
        ('{"timestamp": 0, "input_length": 7, "output_length": null}', "no 'output_length'"),
        ('{"timestamp": 0, "input_length": true, "output_length": 1}', "input_length = True"),
        ('{"timestamp": 0, "input_length": 7.0, "output_length": 1}', r"input_length = 7\.0"),
        ('{"timestamp": 0, "input_length": [7], "output_length": 1}', r"input_length = \[7\]"),
        ('{"timestamp": NaN, "input_length": 7, "output_length": 1}', "timestamp = nan"),
        ('{"timestamp": {}, "input_length": 7, "output_length": 1}', "timestamp = {} is no time"),
        ('{"TIMESTAMP": 3, "ContextTokens": 7, "GeneratedTokens": 1}', "TIMESTAMP = 3 is no time"),
        ('{"timestamp": 0, "input_length": 7, "output_length": 1, "model": "m"}', "unknown 'model'"),
        (
            '{"timestamp": 0, "input_length": 7, "output_length": 1, "hash_ids": [true]}',
            r"hash_ids = \[True\] is no list of whole numbers",
        ),
    ],
)
def test_a_wrong_value_in_json_is_told_by_line_and_field(tmp_path: Path, line: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        read_trace(write(tmp_path, "own.jsonl", line + "\n"))


def test_bytes_that_are_no_text_are_told_by_their_line(tmp_path: Path) -> None:
    path = tmp_path / "own.csv"
    path.write_bytes(HEADER.encode() + b"0,1,\xff\n")
    with pytest.raises(ConfigError, match="line 2 is malformed: not UTF-8"):
        read_trace(path)
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        read_trace(tmp_path)


NAMES = st.sampled_from(
    [
        *("timestamp", "input_length", "output_length", "hash_ids", "TIMESTAMP", "ContextTokens"),
        *("GeneratedTokens", "prompt_tokens", "output_tokens", "pd_ratio", ""),
    ]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=5),
    max_leaves=12,
)
CELLS = st.sampled_from(
    ["0", "1", "7", "-3", "nan", "1e999", '"', "[1]", "[[", "2026-01-01", "", "\x00"]
) | st.text(max_size=6)


def read_or_refuse(folder: Path, name: str, content: bytes) -> None:
    """Whatever is in a file, it is records that make sense or a ConfigError."""
    path = folder / name
    path.write_bytes(content)
    with contextlib.suppress(ConfigError):
        records = read_trace(path)
        assert records
        assert all(1 <= length <= MAX_TOKENS for r in records for length in (r.input_tokens, r.output_tokens))
        times = [r.arrival_s for r in records if r.arrival_s is not None]
        assert len(times) in {0, len(records)}
        assert times == sorted(times)
        assert times[:1] in ([], [0.0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


@settings(max_examples=100, deadline=None, derandomize=True)
@given(name=st.sampled_from(["log", "log.csv", "log.jsonl"]), content=st.binary() | st.text().map(str.encode))
def test_arbitrary_content_is_read_or_refused(folder: Path, name: str, content: bytes) -> None:
    read_or_refuse(folder, name, content)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(rows=st.lists(st.dictionaries(NAMES, JSON, max_size=5) | JSON, max_size=4))
@example(rows=[{"timestamp": -(2**53), "input_length": 1, "output_length": 1}])
@example(rows=[{"TIMESTAMP": "0001-01-01T00:00:00+23:59", "ContextTokens": 1, "GeneratedTokens": 1}])
@example(rows=[{"timestamp": 10**400, "input_length": 1, "output_length": 1}])
def test_arbitrary_json_is_read_or_refused(folder: Path, rows: list[Any]) -> None:
    read_or_refuse(folder, "log.jsonl", "\n".join(map(json.dumps, rows)).encode())


HEADERS = st.sampled_from([HEADER.strip().split(","), ["prompt_tokens", "output_tokens"]])


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    header=HEADERS | st.lists(NAMES, max_size=5),
    rows=st.lists(st.lists(st.sampled_from(["1", "7", "900"]) | CELLS, max_size=4), max_size=4),
)
def test_an_arbitrary_csv_is_read_or_refused(folder: Path, header: list[str], rows: list[list[str]]) -> None:
    read_or_refuse(folder, "log.csv", "\n".join(map(",".join, [header, *rows])).encode())
