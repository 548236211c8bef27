"""The second engine of a profile: a real process with a small model."""

from __future__ import annotations

import pytest
from diphase.engine.config import EngineConfig
from diphase.engine.neighbour import neighbour
from diphase.engine.profiler import IDLE
from diphase.proto.errors import InternalError


def test_it_does_what_it_is_told_and_ends_with_its_input() -> None:
    with neighbour(EngineConfig(model="dummy:tiny", kv_cache_mib=16), ()) as other:
        for kind in ("prefill", "decode", IDLE, "prefill"):
            other.tell(kind)
        times = other.time({"prefill": (), "decode": ()})
        assert set(times) == {"prefill", "decode"}
        assert all(0.0 < seconds < 60.0 for seconds in times.values())
        other.tell(IDLE)
        process = other._process
        assert process.poll() is None
    assert process.returncode == 0


def test_one_that_cannot_load_its_model_is_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    with (
        pytest.raises(InternalError, match="the second engine said '' instead of 'ready'"),
        neighbour(EngineConfig(model="dummy:none"), ()),
    ):
        raise AssertionError("it was never ready")
    assert "write dummy:PRESET" in capfd.readouterr().err
