from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from diphase.cluster.config import load
from diphase.cluster.foundation import Foundation
from diphase.cluster.ray_runtime import RayRuntime
from diphase.cluster.store import Store
from diphase.cluster.supervisor import Cluster
from diphase.proto.clock import system_rng


class DeafProcess:
    """Never stops by itself."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.abandoned = False

    async def close(self) -> None:
        self.asked.set()
        await asyncio.Event().wait()

    def abandon(self) -> None:
        self.abandoned = True


def cluster_of(process: DeafProcess, hurry: asyncio.Event, folder: Path) -> Cluster:
    """A cluster that consists of one process; neither Ray nor its store is there."""
    base = Foundation(
        folder=folder,
        runtime=RayRuntime(private=True, node_id=""),
        store=Store(f"unix://{folder}/store.sock"),
    )
    cluster = Cluster(load(None, (), system_rng()), base, lambda *_: None, hurry)
    slot: Any = SimpleNamespace(process=process)
    cluster.slots.append(slot)
    return cluster


@pytest.mark.parametrize("already", [False, True])
async def test_an_end_in_a_hurry_waits_for_no_process(already: bool, tmp_path: Path) -> None:
    process, hurry = DeafProcess(), asyncio.Event()
    closing = asyncio.ensure_future(cluster_of(process, hurry, tmp_path).close())
    if not already:
        await process.asked.wait()
        assert not process.abandoned
    hurry.set()
    async with asyncio.timeout(30.0):
        await closing
    assert process.abandoned
