"""DistServe's coefficients: its formula by hand, its capacities, and what it did not measure."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from diphase.cluster.planner.distserve import FOLDER, distserve_kv_capacities, distserve_step_time
from diphase.cluster.planner.hardware import load_hardware
from diphase.cluster.planner.machines import DistServeMachine, Parallel
from diphase.cluster.planner.model_shape import load_model_shape
from diphase.proto.errors import ConfigError
from diphase.router.step_time import StepShape

from ...router.shapes import prompt_shape
from ...router.step_time_laws import check_lines, check_stages


def test_prefill_of_opt_13b_is_the_published_sum(data: Path) -> None:
    model = distserve_step_time(data, model="opt-13b", tp=1, overheads=True)
    ms = 18.10254647486372 + 0.1019122572698738 * 512 + 7.122264314252114e-06 * 512**2
    assert model.step_s(prompt_shape(512)) * 1e3 == pytest.approx(ms + 1.0 + 2.0 + 1e-4 * 512, rel=1e-9)
    bare = distserve_step_time(data, model="facebook/opt-13b", tp=1)
    assert bare.step_s(prompt_shape(512)) * 1e3 == pytest.approx(ms, rel=1e-9)


def test_two_prompts_add_their_squares(data: Path) -> None:
    model = distserve_step_time(data, model="opt-13b", tp=1)
    shape = StepShape(300, prompt_shape(100).prefill_context + prompt_shape(200).prefill_context)
    ms = 18.10254647486372 + 0.1019122572698738 * 300 + 7.122264314252114e-06 * (100**2 + 200**2)
    assert model.step_s(shape) * 1e3 == pytest.approx(ms, rel=1e-9)


@pytest.mark.parametrize(
    ("batch", "a", "b", "c"),
    [
        (94, 30.760284619429587, 0.000451947603788462, 0.063284195750671),
        (95, 27.47082137429487, 0.0004046845541646486, 0.12480667738300383),
    ],
)
def test_decode_of_opt_66b_in_both_regimes_on_two_stages(
    data: Path, batch: int, a: float, b: float, c: float
) -> None:
    model = distserve_step_time(data, model="opt-66b", tp=4, pp=2, overheads=True)
    before = batch * 600
    first, second = model.stage_s(StepShape(decode_batch=batch, decode_context=before + batch))
    part = (a + b * (before + batch) + c * batch) / 2
    assert second * 1e3 == pytest.approx(part, rel=1e-9)
    assert first * 1e3 == pytest.approx(part + 2.0 + 1e-4 * before, rel=1e-9)


def test_each_stage_of_a_prefill_takes_as_many_milliseconds_more_as_there_are(data: Path) -> None:
    model = distserve_step_time(data, model="opt-66b", tp=2, pp=4, engine="vllm")
    shape = prompt_shape(1000)
    total = 58.3822026348141 + 0.3826408030281867 * 1000 - 7.1141486747694485e-06 * 1000**2
    assert [s * 1e3 for s in model.stage_s(shape)] == pytest.approx([total / 4 + 4.0] * 4, rel=1e-9)


@pytest.mark.parametrize("engine", ["distserve", "vllm"])
@pytest.mark.parametrize(("model", "tps"), [("opt-13b", (1, 2, 4)), ("opt-66b", (2, 3, 4, 8))])
def test_every_published_set_keeps_the_laws(
    data: Path, engine: str, model: str, tps: tuple[int, ...]
) -> None:
    for tp in tps:
        for pp in (1, 2):
            step_time = distserve_step_time(data, model=model, tp=tp, pp=pp, engine=engine)
            check_stages(step_time, prompt_shape(512))
            for batch in (1, 94, 95, 200):
                check_lines(step_time, batch, [batch * 100.0, batch * 2000.0])


def test_kv_capacities_are_the_published_ones(data: Path) -> None:
    assert distserve_kv_capacities(data, model="opt-13b")[1, 1] == 66_144
    found = distserve_kv_capacities(data, model="facebook/opt-66b")
    assert (found[4, 1], found[2, 2]) == (78_496, 78_512)


def test_what_was_not_measured_is_named_with_what_was(data: Path) -> None:
    with pytest.raises(ConfigError, match=r"model opt-30b .* facebook/opt-13b, facebook/opt-66b"):
        distserve_step_time(data, model="opt-30b", tp=1)
    with pytest.raises(ConfigError, match=r"with tp 3 .* there is 1, 2, 4"):
        distserve_step_time(data, model="opt-13b", tp=3)
    with pytest.raises(ConfigError, match=r"engine sglang .* distserve, vllm"):
        distserve_step_time(data, model="opt-13b", tp=1, engine="sglang")
    with pytest.raises(ConfigError, match=r"model opt-30b .* facebook/opt-13b, facebook/opt-175b"):
        distserve_kv_capacities(data, model="opt-30b")
    with pytest.raises(ConfigError, match="pp = 0"):
        distserve_step_time(data, model="opt-13b", tp=1, pp=0)


def test_missing_and_malformed_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"needs? the file .*profiler-a100-80g\.distserve\.json"):
        distserve_step_time(tmp_path, model="opt-13b", tp=1)
    folder = tmp_path / FOLDER
    folder.mkdir()
    profile = folder / "profiler-a100-80g.distserve.json"
    for text, said in (
        ("{", "not valid JSON"),
        ("[]", "no JSON object"),
        ('{"opt-13b": {"1": {"prefill": [1, 2]}}}', "entry of opt-13b, tp 1, is malformed"),
    ):
        profile.write_text(text)
        with pytest.raises(ConfigError, match=said):
            distserve_step_time(tmp_path, model="opt-13b", tp=1)
    (folder / "max_num_tokens.csv").write_text("model,tp,pp,max_num_tokens\nopt-13b,1,1,5\nopt-13b,1,2,-7\n")
    with pytest.raises(ConfigError, match=r"max_num_tokens\.csv, line 3 is malformed: -7"):
        distserve_kv_capacities(tmp_path, model="opt-13b")


def machine(folder: Path, name: str = "opt-13b") -> DistServeMachine:
    return DistServeMachine(load_model_shape(name), load_hardware("a100-sxm-80gb"), name, folder)


def test_a_plan_adds_no_overhead_that_the_measurements_have_in_them(data: Path) -> None:
    step_time = machine(data).step_time(Parallel())
    assert step_time.step_s(prompt_shape(512)) == distserve_step_time(
        data, model="opt-13b", tp=1, overheads=False
    ).step_s(prompt_shape(512))


def test_memory_that_is_not_published_is_arithmetic_and_a_missing_file_is_an_error(
    data: Path, tmp_path: Path
) -> None:
    assert machine(data).kv_tokens(Parallel(1, 1)) == 66_144
    assert (1, 40) not in distserve_kv_capacities(data, model="opt-13b")
    assert machine(data).kv_tokens(Parallel(1, 40)) > 3_000_000
    with pytest.raises(ConfigError, match="would hold 122"):
        machine(data, "opt-66b").kv_tokens(Parallel(1, 1))
    folder = tmp_path / FOLDER
    folder.mkdir()
    with pytest.raises(ConfigError, match=r"profiler-a100-80g\.distserve\.json"):
        machine(tmp_path)
    shutil.copy(data / FOLDER / "profiler-a100-80g.distserve.json", folder)
    with pytest.raises(ConfigError, match=r"max_num_tokens\.csv"):
        machine(tmp_path)
