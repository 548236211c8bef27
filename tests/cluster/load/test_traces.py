"""Reading traces: both formats, errors that say what to do, and the real files where they are."""

from __future__ import annotations

from pathlib import Path

import pytest
from diphase.cluster.load.trace_formats import TraceRecord, read_trace
from diphase.cluster.load.traces import TRACES, data_folder, load_trace
from diphase.proto.errors import ConfigError

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens\r
2023-11-16 18:15:50.9951690,396,109\r
2023-11-16 18:15:46.6805900,374,44\r
2023-11-16 18:15:51.2224670,879,55\r
"""
MOONCAKE = """{"timestamp": 0, "input_length": 1000, "output_length": 5, "hash_ids": [0, 1]}

{"timestamp": 3000, "input_length": 700, "output_length": 7, "hash_ids": [0, 2]}
"""


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, newline="")
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


def test_traces_are_found_by_name_below_the_data_folder(tmp_path: Path) -> None:
    write(tmp_path, TRACES["azure-code"].path, AZURE)
    write(tmp_path, TRACES["mooncake-synthetic"].path, MOONCAKE)
    assert len(load_trace("azure-code", tmp_path)) == 3
    assert len(load_trace("mooncake-synthetic", tmp_path)) == 2


def test_a_missing_file_says_where_to_get_it_and_where_to_put_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_trace("azure-conv", tmp_path)
    message = caught.value.message
    assert str(tmp_path / "azure2023/AzureLLMInferenceTrace_conv.csv") in message
    assert "https://github.com/Azure/AzurePublicDataset" in message
    assert "DIPHASE_DATA" in message


def test_an_unknown_trace_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="azure-code, azure-conv, mooncake-conversation"):
        load_trace("azure", tmp_path)


def test_the_data_folder_is_the_option_then_the_variable_then_beside_the_repository() -> None:
    environ = {"DIPHASE_DATA": "/from/variable"}
    assert data_folder("/from/option", environ) == Path("/from/option")
    assert data_folder(None, environ) == Path("/from/variable")
    repository = Path(__file__).resolve().parents[3]
    assert data_folder(None, {}) == repository.parent / "shared" / "data"


@pytest.mark.parametrize(
    ("name", "count", "mean_input", "mean_output"),
    [
        ("azure-conv", 19_366, 1155, 211),
        ("azure-code", 8_819, 2048, 28),
        ("mooncake-conversation", 12_031, 12_035, 343),
        ("mooncake-synthetic", 3_993, 15_326, 149),
    ],
)
def test_the_published_traces_have_their_published_sizes(
    name: str, count: int, mean_input: float, mean_output: float, data: Path
) -> None:
    records = load_trace(name, data)
    assert len(records) == count
    assert sum(r.input_tokens for r in records) / count == pytest.approx(mean_input, abs=1)
    assert sum(r.output_tokens for r in records) / count == pytest.approx(mean_output, abs=1)
    assert records[0].arrival_s == 0.0
    times = [record.arrival_s for record in records if record.arrival_s is not None]
    assert len(times) == count
    assert times == sorted(times)


@pytest.fixture
def data() -> Path:
    """The folder of the published traces; their tests are skipped only where it does not exist at all."""
    import os

    folder = data_folder(None, os.environ)
    if not folder.is_dir():
        pytest.skip(f"no traces: the folder {folder} does not exist (set DIPHASE_DATA)")
    return folder
