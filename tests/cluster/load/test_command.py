"""`diphase bench` as a person types it, against a scripted gateway."""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from diphase.cluster.load import command
from diphase.proto import inference_pb2 as pb
from diphase.proto.errors import ConfigError
from rich.console import Console

from .conftest import Context, ScriptedGateway

ADDRESS = "127.0.0.1:1"


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(words)


async def run_bench(gateway: ScriptedGateway, tmp_path: Path, *words: str) -> tuple[int, str, dict[str, Any]]:
    """(exit code, terminal, JSON)."""
    args = parse("--output", str(tmp_path / "new" / "out"), *words)
    terminal = io.StringIO()
    code = await command.bench(command.config_from(args, gateway.address), Console(file=terminal, width=160))
    return code, terminal.getvalue(), json.loads((tmp_path / "new" / "out.json").read_text())


async def test_one_rate_prints_a_table_and_writes_json(gateway: ScriptedGateway, tmp_path: Path) -> None:
    words = ("--rate", "200", "--requests", "12", "--mean-input", "20", "--mean-output", "5")
    code, terminal, written = await run_bench(gateway, tmp_path, *words)
    assert code == 0
    assert "12 requests at 200/s: 100.0% met" in terminal
    assert "server: prefill" in terminal
    assert written["model"] == "scripted"
    assert written["slo"] == {"ttft_ms": 60_000.0, "tpot_ms": 30_000.0, "priority": 2}
    [run] = written["runs"]
    assert run["num_requests"] == 12
    assert run["outcomes"] == {"finished": 12}
    assert len(gateway.requests) == 14  # two to warm up
    assert not (tmp_path / "new" / "out.png").exists()


async def test_a_sweep_has_a_goodput_and_a_picture(gateway: ScriptedGateway, tmp_path: Path) -> None:
    words = (
        "--rate",
        "200,400",
        "--requests",
        "5",
        "--mean-input",
        "9",
        "--mean-output",
        "2",
        "--warm-up",
        "0",
    )
    code, terminal, written = await run_bench(gateway, tmp_path, *words)
    assert code == 0
    assert "goodput at 90% attainment: ≥ 400.00 requests/s" in terminal
    assert [run["rate"] for run in written["runs"]] == [200.0, 400.0]
    assert written["goodput"] == {"rate": 400.0, "low": 0.0, "high": None, "bracketed": False}
    assert (tmp_path / "new" / "out.png").read_bytes().startswith(b"\x89PNG")
    prompts = {bytes(request.token_ids.SerializeToString()) for request in gateway.requests}
    assert len(prompts) == 10, "a later run found earlier prompts"


async def test_a_search_goes_on_from_the_first_rate(gateway: ScriptedGateway, tmp_path: Path) -> None:
    words = ("--rate", "100", "--search", "--max-points", "3", "--requests", "4", "--warm-up", "0")
    _, _, written = await run_bench(gateway, tmp_path, *words)
    assert [run["rate"] for run in written["runs"]] == [100.0, 150.0, 225.0]


async def test_objectives_can_be_given(gateway: ScriptedGateway, tmp_path: Path) -> None:
    words = ("--rate", "100", "--requests", "2", "--ttft-ms", "0.001", "--warm-up", "0")
    code, terminal, written = await run_bench(gateway, tmp_path, *words)
    assert code == 0
    assert "0.0% met" in terminal
    assert written["slo"]["ttft_ms"] == 0.001


async def test_a_run_in_which_nothing_finished_is_a_failure(gateway: ScriptedGateway, tmp_path: Path) -> None:
    async def refuse(_: pb.GenerateRequest, context: Context) -> AsyncIterator[pb.GenerateResponse]:
        await context.abort(grpc.StatusCode.UNAVAILABLE, "no worker is ready")
        yield pb.GenerateResponse()

    gateway.script = refuse
    words = ("--rate", "100", "--requests", "3", "--warm-up", "0")
    code, terminal, _ = await run_bench(gateway, tmp_path, *words)
    assert code == 1
    assert "3 × UNAVAILABLE: no worker is ready" in terminal


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ((), "--rate is missing"),
        (("--rate", "fast"), "no number"),
        (("--rate", "0"), "out of range"),
        (("--rate=-1,2",), "out of range"),
        (("--rate", "1", "--requests", "0"), "at least 1"),
        (("--rate", "1", "--arrivals", "gamma", "--cv", "0"), "cv = 0"),
        (("--rate", "1", "--mean-input", "5"), "both means"),
        (("--rate", "1", "--timeout-s", "0"), "timeout-s 0"),
        (("--rate", "1", "--max-points", "0"), "max-points 0"),
        (("--rate", "1", "--warm-up", "-1"), "warm-up -1"),
        (("--arrivals", "trace", "--search"), "needs --rate"),
    ],
)
def test_wrong_options_are_refused_with_a_sentence(words: tuple[str, ...], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        command.config_from(parse(*words), ADDRESS)


def test_a_missing_trace_says_where_to_get_it(tmp_path: Path) -> None:
    words = ("--rate", "1", "--trace", "azure-conv", "--data", str(tmp_path))
    with pytest.raises(ConfigError, match="AzurePublicDataset"):
        command.run(parse(*words), ADDRESS)


def test_an_unknown_trace_and_a_malformed_log_are_told_before_the_load(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no trace is called 'azure'; use one of azure-code"):
        command.run(parse("--rate", "1", "--trace", "azure"), ADDRESS)
    (tmp_path / "own.csv").write_text("timestamp,input_length,output_length\n0,-4,1\n")
    with pytest.raises(ConfigError, match=r"own\.csv, line 2 is malformed: input_length = -4"):
        command.run(parse("--rate", "1", "--trace", str(tmp_path / "own.csv")), ADDRESS)


async def test_a_log_of_ones_own_is_replayed(gateway: ScriptedGateway, tmp_path: Path) -> None:
    log = tmp_path / "own.jsonl"
    rows = [{"timestamp": 5 * i, "input_length": 10 + i, "output_length": 2} for i in range(4)]
    log.write_text("\n".join(map(json.dumps, rows)))
    words = ("--arrivals", "trace", "--trace", str(log), "--requests", "4", "--warm-up", "0")
    code, _, written = await run_bench(gateway, tmp_path, *words)
    assert code == 0
    assert written["trace"] == str(log)
    assert sorted(len(request.token_ids.ids) for request in gateway.requests) == [10, 11, 12, 13]


async def test_an_output_that_cannot_be_written_is_told_before_the_load(
    gateway: ScriptedGateway, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("no folder")
    args = parse("--rate", "1", "--output", str(tmp_path / "file" / "out"))
    with pytest.raises(ConfigError, match=r"--output .*file/out cannot be written: "):
        await command.bench(command.config_from(args, gateway.address), Console(file=io.StringIO()))
    assert not gateway.requests


def test_fixed_lengths_are_the_default() -> None:
    workload = command.config_from(parse("--rate", "1"), ADDRESS).workload
    assert (workload.mean_input, workload.mean_output) == (256, 48)
    traced = command.config_from(parse("--rate", "1", "--trace", "azure-conv"), ADDRESS).workload
    assert (traced.mean_input, traced.mean_output) == (None, None)
