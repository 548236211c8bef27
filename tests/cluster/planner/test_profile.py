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


def written(tmp_path: Path, at: str = "", **changes: Any) -> Path:
    """`at`: inside which of its tables, with dots between their names."""
    path = tmp_path / "profile.json"
    write_json(path, profile().to_dict())
    whole = content = json.loads(path.read_text())
    for part in at.split(".") if at else ():
        content = content[int(part) if part.isdigit() else part]
    for name, value in changes.items():
        if value is None:
            del content[name]
        else:
            content[name] = value
    path.write_text(json.dumps(whole))
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
        ({"engine": [1]}, r"engine = \[1\]; use a table"),
        ({"at": "engine", "block_size": 0}, r"engine\.block_size = 0; use a whole number above 0"),
        ({"at": "engine", "threads": 0}, r"engine\.threads = 0; use a whole number above 0"),
        ({"at": "engine", "num_blocks": 1.5}, r"engine\.num_blocks = 1\.5; use a whole number"),
        ({"at": "engine", "model": ""}, r"engine\.model = ''; use a name"),
        ({"cells": 3}, "cells = 3; use a list"),
        ({"cells": []}, "cells: no step has prompts"),
        ({"at": "cells.0", "median_s": "x"}, "cells: median_s = 'x' of a step; use a number"),
        ({"at": "cells.0.shape", "prefill_tokens": -1}, "cells: prefill_tokens = -1 of a step"),
        ({"at": "cells.0.shape", "prefill_tokens": 0, "prefill_context": 0}, "a step without work"),
        ({"at": "cells.0", "shape": 7}, r"cells\.shape = 7; use a table"),
        ({"at": "step_time", "decode": 1}, r"step_time\.decode = 1; use a table"),
        ({"at": "step_time.decode", "boundary": "x"}, r"step_time\.decode\.boundary = 'x'"),
        ({"at": "step_time.decode.small", "base": "x"}, r"step_time\.decode\.small\.base = 'x'"),
        ({"at": "coefficients", "base": True}, r"coefficients\.base = True; use a number"),
        (
            {"at": "coefficients", "base": 1e308},
            r"coefficients\.base = 1e\+308; use a number of seconds, at most",
        ),
        ({"at": "engine", "num_blocks": 10**30}, r"whole number above 0, at most 2147483647"),
        ({"at": "slowdown", "decode": 2}, r"slowdown\.decode\.prefill = None; use 1 to 1000"),
        ({"at": "serving", "step_s": "x"}, r"serving\.step_s = x is out of range"),
        ({"machine": [2]}, r"machine = \[2\]; use a table"),
        ({"machine": {"cores": 0}}, r"machine\.cores = 0; use a whole number above 0"),
    ],
)
def test_a_wrong_file_is_refused_by_its_field(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_profile(written(tmp_path, **changes))


def test_a_machine_that_is_null_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path)
    path.write_text(json.dumps({**json.loads(path.read_text()), "machine": None}))
    with pytest.raises(ConfigError, match=r"machine = None; use a table, with cpu and cores"):
        load_profile(path)


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
