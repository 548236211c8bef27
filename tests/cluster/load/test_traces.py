"""Traces by name and by path, errors that say what to do, and the real files where they are."""

from __future__ import annotations

from pathlib import Path

import pytest
from diphase.cluster.load.trace_formats import TraceRecord
from diphase.cluster.load.traces import TRACES, data_folder, load_trace
from diphase.proto.errors import ConfigError

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:15:46.6805900,374,44
"""
MOONCAKE = """{"timestamp": 0, "input_length": 1000, "output_length": 5, "hash_ids": [0, 1]}
"""


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, newline="")
    return path


def test_traces_are_found_by_name_below_the_data_folder(tmp_path: Path) -> None:
    write(tmp_path, TRACES["azure-code"].path, AZURE)
    write(tmp_path, TRACES["mooncake-synthetic"].path, MOONCAKE)
    write(tmp_path, TRACES["humaneval"].path, "prompt_tokens,output_tokens\n142,137\n")
    assert [r.input_tokens for r in load_trace("azure-code", tmp_path)] == [374, 396]
    assert [r.hash_ids for r in load_trace("mooncake-synthetic", tmp_path)] == [(0, 1)]
    assert [r.arrival_s for r in load_trace("humaneval", tmp_path)] == [None]


def test_a_name_with_a_suffix_is_the_path_of_a_log(tmp_path: Path) -> None:
    path = write(tmp_path, "own.csv", "timestamp,input_length,output_length\n5,7,9\n1005,8,1\n")
    assert load_trace(str(path), tmp_path / "elsewhere") == [
        TraceRecord(arrival_s=0.0, input_tokens=7, output_tokens=9),
        TraceRecord(arrival_s=1.0, input_tokens=8, output_tokens=1),
    ]
    with pytest.raises(ConfigError, match=r"none\.csv cannot be read: No such file"):
        load_trace(str(tmp_path / "none.csv"), tmp_path)


def test_a_log_of_ones_own_must_be_in_order(tmp_path: Path) -> None:
    path = write(tmp_path, "own.csv", AZURE)
    with pytest.raises(ConfigError, match=r"own\.csv, line 3 .* is before that of the row above"):
        load_trace(str(path), tmp_path)


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


@pytest.mark.parametrize(
    ("name", "count", "mean_input", "mean_output"),
    [
        ("sharegpt", 30_731, 2340, 439),
        ("humaneval", 164, 171.35, 98.17),
        ("arxiv", 28_257, 2588, 291),
    ],
)
def test_the_published_lengths_have_no_times(
    name: str, count: int, mean_input: float, mean_output: float, data: Path
) -> None:
    records = load_trace(name, data)
    assert len(records) == count
    assert sum(r.input_tokens for r in records) / count == pytest.approx(mean_input, abs=0.5)
    assert sum(r.output_tokens for r in records) / count == pytest.approx(mean_output, abs=0.5)
    assert {(r.arrival_s, r.hash_ids) for r in records} == {(None, ())}


def test_every_trace_has_a_test_of_its_published_size() -> None:
    assert set(TRACES) == {
        *("azure-code", "azure-conv", "mooncake-conversation", "mooncake-synthetic"),
        *("sharegpt", "humaneval", "arxiv"),
    }
