"""What several integration tests use: a disaggregated cluster of real processes, shared by those that leave
it as they found it, and an engine that nothing disturbs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from diphase.engine.config import EngineConfig
from diphase.engine.engine import TorchEngine

from .served import TINY, Served, served


@pytest.fixture(scope="session")
def cluster() -> Iterator[Served]:
    """One prefill and one decode worker and two gateways on a tiny model of dummy weights."""
    with served(*TINY, "gateway.replicas=2") as cluster:
        yield cluster


@pytest.fixture(scope="module")
def engine() -> Iterator[TorchEngine]:
    """To say what an undisturbed request gives. In fp32: rounding must not decide between two tokens where
    prefill computes again what was decoded."""
    engine = TorchEngine.load(EngineConfig(model="dummy:tiny", dtype="fp32", kv_cache_mib=64))
    yield engine
    engine.close()
