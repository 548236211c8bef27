"""Transports of this process, closed at the end of a test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from diphase.kv_transfer.transports.local import LocalHub

from .transport_ends import End


@pytest.fixture
def make() -> Iterator[Callable[..., End]]:
    ends: list[End] = []
    hub = LocalHub()

    def make_end(name: str, incarnation: str, **more: Any) -> End:
        ends.append(End(name, incarnation, hub, **more))
        return ends[-1]

    yield make_end
    for end in ends:
        end.close()
