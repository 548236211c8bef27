"""`diphase profile` and `diphase validate` as a person types them: a small model, a real cluster."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from diphase.cluster.cli import main
from diphase.cluster.planner.profile import load_profile

SETTINGS = (
    "engine.kv_cache_mib=32",
    "pools.prefill.chunk_budget=256",
    "pools.decode.max_running=8",
    "pools.colocated.prefill_budget=256",
    "pools.colocated.max_running=8",
)
LOG = "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(
    f"2024-01-01 00:00:{i:02d},{100 + 20 * i},{8 + i}\n" for i in range(12)
)


def words(*more: str) -> list[str]:
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    return ["--model", "dummy:tiny", *settings, *more]


@pytest.mark.slow
def test_a_profiled_machine_is_predicted_and_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile, result, log = tmp_path / "profile.json", tmp_path / "validate.json", tmp_path / "log.csv"
    log.write_text(LOG)
    assert main(["profile", *words("--rounds", "2", "--output", str(profile))]) == 0
    serving = load_profile(profile).serving
    assert 0.0 < serving.first_token_s < 1.0
    assert 0.0 < serving.handoff_s + 1.0 / serving.handoff_bytes_per_s < 1.0
    options = ("--profile", str(profile), "--trace", str(log), "--placement", "1p1d")
    sizes = ("--requests", "12", "--rates", "8", "--mean-input", "200", "--mean-output", "12")
    code = main(["validate", *words(*options, *sizes, "--output", str(result))])
    found = json.loads(result.read_text())
    [rate] = found["rates"]
    assert code == (0 if found["verdict"]["inside"] else 1)
    assert rate["rate"] == 8.0
    assert len(rate["errors"]) == 6
    assert set(rate["predicted"]["busy"]) == {"prefill", "decode"}
    for side in ("measured", "predicted"):
        assert 0.0 < rate[side]["ttft_ms"]["p50"] <= rate[side]["ttft_ms"]["p99"]
        assert 0.0 < rate[side]["tpot_ms"]["p50"] < 1000.0
    assert "median error" in capsys.readouterr().out
