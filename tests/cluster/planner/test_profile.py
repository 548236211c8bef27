"""A profile's file: what is written is read again, and what is wrong in one is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from diphase.cluster.load.report import write_json
from diphase.cluster.planner.profile import ALONE, ServingCost, Slowdown, load_profile
from diphase.proto.errors import ConfigError

from .profiles import FACTS, profile


def written(tmp_path: Path, **changes: Any) -> Path:
    path = tmp_path / "profile.json"
    write_json(path, profile().to_dict())
    content = json.loads(path.read_text())
    for name, value in changes.items():
        if value is None:
            del content[name]
        else:
            content[name] = value
    path.write_text(json.dumps(content))
    return path


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    assert load_profile(written(tmp_path)) == profile()


def test_the_file_shows_errors_by_kind_and_by_cell(tmp_path: Path) -> None:
    content = json.loads(written(tmp_path).read_text())
    assert content["schema"] == 2
    assert content["engine"]["model"] == FACTS.model
    assert set(content["errors"]) == {"prefill", "decode", "mixed"}
    assert content["errors"]["decode"]["cells"] == 21
    assert abs(content["cells"][0]["error"]) < 1e-9
    assert content["cells"][0]["kind"] == "prefill"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 0}, "is no profile of schema 2; make one with `diphase profile`"),
        ({"slowdown": None}, "lacks 'slowdown'"),
        ({"slowdown": {"prefill": {"prefill": 0.5}}}, r"slowdown\.prefill\.prefill = 0\.5; use 1 to 1000"),
        ({"serving": {"handoff_bytes_per_s": None, "first_token_s": -1}}, r"serving\.first_token_s = -1"),
        ({"engine": {"model": "m"}}, "is malformed"),
        ({"cells": 3}, "is malformed"),
    ],
)
def test_a_wrong_file_is_refused_by_its_field(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_profile(written(tmp_path, **changes))


def test_no_file_and_no_json_are_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_profile(tmp_path / "none.json")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ConfigError, match="is no JSON"):
        load_profile(tmp_path / "text")


def test_neighbours_slow_down_by_how_busy_they_are() -> None:
    both = Slowdown(
        factors={"prefill": {"prefill": 1.6, "decode": 1.2}, "decode": {"prefill": 1.4, "decode": 1.0}}
    )
    assert both.of("prefill", 0.0, 0.0) == 1.0
    assert both.of("prefill", 1.0, 0.0) == pytest.approx(1.6)
    assert both.of("decode", 0.5, 0.5) == pytest.approx(1.2)
    assert ALONE.of("decode", 1.0, 1.0) == 1.0


def test_bytes_that_take_no_time_survive_the_file(tmp_path: Path) -> None:
    assert load_profile(written(tmp_path)).serving == ServingCost()
    assert load_profile(written(tmp_path)).serving.handoff_bytes_per_s == float("inf")
