"""A disaggregated cluster of real processes, shared by the tests that leave it as they found it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .served import TINY, Served, served


@pytest.fixture(scope="session")
def cluster() -> Iterator[Served]:
    """One prefill and one decode worker and two gateways on a tiny model of dummy weights."""
    with served(*TINY, "gateway.replicas=2") as cluster:
        yield cluster
