"""Splitwise's measurements: how they become one model, how near it comes, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from diphase.benchmarks import latency_models
from diphase.cluster.planner.splitwise import FILE, read_splitwise, splitwise_step_time
from diphase.proto.errors import ConfigError
from diphase.router.step_time import StepShape

from ...router.shapes import prompt_shape
from ...router.step_time_laws import check_grows, check_lines

HEADER = (
    "model,hardware,prompt_size,batch_size,token_size,peak_power,average_power,prompt_time,token_time,"
    "e2e_time,tensor_parallel\n"
)


def run(prompt: int, batch: int, e2e_ms: float | None = None) -> str:
    """Of a machine whose token takes 40 ms, 1 ms a sequence and 1 µs a token of context."""
    token_ms = 40.0 + batch + 1e-3 * batch * (prompt + 64)
    prompt_ms = 20.0 + 0.1 * batch * prompt
    whole_ms = e2e_ms or prompt_ms + 127 * token_ms
    return f"m,a100,{prompt},{batch},128,1,1,{prompt_ms},{token_ms},{whole_ms},2\n"


ROWS = "".join(run(prompt, 1) for prompt in (128, 512, 2048, 8192)) + "".join(run(512, b) for b in (2, 8, 32))


def write(folder: Path, text: str) -> Path:
    (folder / FILE).parent.mkdir(exist_ok=True)
    (folder / FILE).write_text(text)
    return folder


def test_context_and_batch_are_told_apart(tmp_path: Path) -> None:
    model = splitwise_step_time(write(tmp_path, HEADER + ROWS), model="m", hardware="a100", tp=2)
    for batch, context in ((1, 8000.0), (8, 576.0), (20, 3000.0), (64, 1000.0)):
        step_s = model.step_s(StepShape(decode_batch=batch, decode_context=batch * context))
        assert step_s * 1e3 == pytest.approx(40.0 + batch + 1e-3 * batch * context, rel=1e-6)
    assert model.step_s(prompt_shape(1024)) * 1e3 == pytest.approx(20.0 + 102.4, rel=1e-6)


def test_a_batch_that_waited_for_memory_is_no_measurement_of_a_step(tmp_path: Path) -> None:
    waited = run(512, 64, e2e_ms=1e6)
    model = splitwise_step_time(write(tmp_path, HEADER + ROWS + waited), model="m", hardware="a100", tp=2)
    [runs] = read_splitwise(tmp_path).values()
    assert [r.batch_size for r in runs if not r.as_one_batch] == [64]
    same = splitwise_step_time(write(tmp_path, HEADER + ROWS), model="m", hardware="a100", tp=2)
    shape = StepShape(decode_batch=64, decode_context=64 * 600.0)
    assert model.step_s(shape) == same.step_s(shape)


def test_a_run_that_ended_early_had_a_shorter_context(tmp_path: Path) -> None:
    write(tmp_path, HEADER + run(512, 1, e2e_ms=71.2 + 63 * 41.576))
    [[early]] = read_splitwise(tmp_path).values()
    assert early.generated == pytest.approx(64.0)
    assert early.context == pytest.approx(544.0)


def test_what_was_not_measured_is_named_with_what_was(tmp_path: Path) -> None:
    write(tmp_path, HEADER + ROWS)
    with pytest.raises(ConfigError, match=r"m h100 2 was not measured; there is m a100 2"):
        splitwise_step_time(tmp_path, model="m", hardware="h100", tp=2)
    with pytest.raises(ConfigError, match=r"with pp 2 was not measured; there is 1"):
        splitwise_step_time(tmp_path, model="m", hardware="a100", tp=2, pp=2)


def test_too_few_runs_missing_files_and_bad_rows_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"need the file .*perf_model\.csv"):
        read_splitwise(tmp_path)
    with pytest.raises(ConfigError, match="at least two prompt lengths"):
        splitwise_step_time(write(tmp_path, HEADER + run(512, 1)), model="m", hardware="a100", tp=2)
    write(tmp_path, HEADER + run(512, 1).replace(",512,", ",-5,"))
    with pytest.raises(ConfigError, match="line 2 is malformed: -5"):
        read_splitwise(tmp_path)
    (tmp_path / FILE).write_bytes(b"\xff\xfe\n")
    with pytest.raises(ConfigError, match=r"perf_model\.csv cannot be read: 'utf-8' codec"):
        read_splitwise(tmp_path)
    write(tmp_path, HEADER + "m," + "x" * 200_000)
    with pytest.raises(ConfigError, match="is malformed: field larger than"):
        read_splitwise(tmp_path)


def test_published_runs_keep_the_laws(data: Path) -> None:
    for setup in read_splitwise(data):
        model = splitwise_step_time(data, **setup._asdict())
        for batch in (1, 3, 16, 63, 64):
            check_lines(model, batch, [batch * 600.0])
            check_grows(model, batch, 600.0, 1000.0)


def test_token_times_are_within_ten_percent_for_every_batch(data: Path) -> None:
    """On the median, the mean and the 95th percentile of each batch; and without the batch, on mean and
    median. Only the runs of batch 64 that memory cut into parts stand apart."""
    found = latency_models.of_splitwise(data)
    assert sorted(map(int, found["token time, by batch"])) == [1, 2, 4, 8, 16, 32, 64]
    for batch, errors in found["token time, by batch"].items():
        assert max(errors["median"], errors["mean"], errors["p95"]) <= 0.10, batch
    for batch, errors in found["token time without the batch, by batch"].items():
        assert max(errors["median"], errors["mean"]) <= 0.10, batch
    assert found["token time of runs that did not run as one batch"]["points"] == 15
    assert found["prompt time"]["median"] <= 0.03
