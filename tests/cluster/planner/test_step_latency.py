"""Step latency tables: rows, what is refused, and how well they interpolate."""

from __future__ import annotations

from pathlib import Path

import pytest
from diphase.benchmarks import latency_models
from diphase.cluster.planner.step_latency import FOLDER, read_step_latency, step_latency_time, table_of
from diphase.proto.errors import ConfigError
from diphase.router.step_time import StepShape

from ...router.step_time_laws import check_grows, check_lines, check_stages

HEADER = "model,system,backend,tp,phase,batch,isl,prefix,latency_ms\n"
ROWS = "".join(
    f"owner/m,h100_sxm,vllm,1,{phase},{batch},{isl},0,{5 + batch * isl * 0.01}\n"
    for phase in ("prefill", "decode")
    for batch in (1, 2, 4)
    for isl in (128, 256, 512)
)


def write(folder: Path, text: str) -> Path:
    (folder / FOLDER).mkdir(exist_ok=True)
    (folder / FOLDER / "m.csv").write_text(text)
    return folder


def test_rows_are_the_steps_they_name(tmp_path: Path) -> None:
    write(tmp_path, HEADER + ROWS + "owner/m,h100_sxm,vllm,1,prefill,1,512,384,7.5\n")
    model = step_latency_time(tmp_path, model="m", system="h100", backend="vllm", tp=1)
    step_s = model.step_s(StepShape(decode_batch=4, decode_context=4 * 512))
    assert step_s == pytest.approx(0.005 + 4 * 512 * 1e-5)
    [rows] = read_step_latency(tmp_path).values()
    assert rows[-1].prefill_point == (128, 128 * (384 + 64), 0.0075)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"model": "n"}, r"the model n was not measured; there is owner/m"),
        ({"system": "a100"}, r"the system a100 was not measured; there is h100_sxm"),
        ({"backend": "sglang"}, r"the backend sglang was not measured; there is vllm"),
        ({"tp": 3}, r"the tp 3 was not measured; there is 1"),
        ({"pp": 2}, r"with pp 2 was not measured; there is 1"),
    ],
)
def test_what_was_not_measured_is_named_with_what_was(
    tmp_path: Path, asked: dict[str, object], said: str
) -> None:
    write(tmp_path, HEADER + ROWS)
    there: dict[str, object] = {"model": "owner/m", "system": "h100_sxm", "backend": "vllm", "tp": 1}
    with pytest.raises(ConfigError, match=said):
        step_latency_time(tmp_path, **{**there, **asked})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("m,s,b,1,decode,1,128,0,", "malformed"),
        ("m,s,b,1,decode,1,128,0,-3", "-3 where a number above 0"),
        ("m,s,b,1,decode,0,128,0,3", "0 where a whole number above 0"),
        ("m,s,b,1,train,1,128,0,3", "'train' is neither prefill nor decode"),
        ("m,s,b,1,prefill,1,128,128,3", "prefix of 128 of 128"),
        ("m,s,b,1,prefill,1", "malformed"),
    ],
)
def test_malformed_rows_are_named_by_file_and_line(tmp_path: Path, row: str, said: str) -> None:
    write(tmp_path, HEADER + row + "\n")
    with pytest.raises(ConfigError, match=rf"m\.csv, line 2 .*{said}"):
        read_step_latency(tmp_path)


def test_missing_columns_and_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no CSV file"):
        read_step_latency(tmp_path)
    write(tmp_path, "model,system\nm,s\n")
    with pytest.raises(ConfigError, match="lacks the column 'backend'"):
        read_step_latency(tmp_path)


def test_all_published_tables_keep_the_laws(data: Path) -> None:
    by_setup = read_step_latency(data)
    assert len(by_setup) == 42
    for setup, rows in by_setup.items():
        model = table_of(rows)
        for batch in (1, 5, 64, 300, 511):
            check_lines(model, batch, [0.0, batch * 100.0, batch * 128.0, batch * 3000.0])
            for context in (10.0, 500.0, 20_000.0):
                check_grows(model, batch, context, 777.0)
        check_stages(model, StepShape(512, 512 * 256, 16, 16 * 1000))
        again = step_latency_time(data, **setup._asdict())
        assert again.decode_line(16, 5000.0) == model.decode_line(16, 5000.0)


def test_held_out_points_are_within_three_percent(data: Path) -> None:
    """On the mean and the median: of single points, of whole batches, contexts and numbers of tokens."""
    for name, found in latency_models.interpolation(data).items():
        assert found["mean"] <= 0.03, name
        assert found["median"] <= 0.03, name
        assert found["points"] > 400
