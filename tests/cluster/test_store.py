from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import redis
from diphase.cluster import processes
from diphase.cluster.config import StoreConfig
from diphase.cluster.store import LONGEST_PAUSE_S, LOOK_S, PrivateServer, Store, keep_running, open_store
from diphase.proto.errors import ConfigError, InternalError

from ..simulation.virtual_loop import run_virtually


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Short: unix socket paths have at most 107 bytes.
    return tmp_path_factory.mktemp(f"s{os.getpid()}-")


@pytest.fixture
def store(folder: Path) -> Iterator[Store]:
    store = open_store(StoreConfig(), folder)
    yield store
    store.stop()


async def test_the_private_server_answers_on_its_socket(store: Store) -> None:
    client = store.client()
    await client.set("a", "1")
    assert await client.get("a") == b"1"
    await client.aclose()


async def test_the_private_server_is_started_anew_after_it_died(store: Store, folder: Path) -> None:
    assert not store.restart_if_dead()
    [pid] = processes.marked(folder.name)
    os.kill(pid, signal.SIGKILL)
    # Reaped by the check itself.
    while not store.restart_if_dead():
        pass
    client = store.client()
    assert await client.get("a") is None
    await client.aclose()


def test_a_server_that_cannot_be_started_anew_is_tried_again_with_growing_pauses() -> None:
    outcomes: list[bool | Exception] = [
        InternalError("the private Valkey server did not start"),
        OSError(28, "No space left on device"),
        MemoryError(),
        *[InternalError("it did not start")] * 5,
        True,
        False,
        OSError("again"),
        False,
    ]
    looked_at: list[float] = []
    finished = asyncio.Event()

    async def restart_if_dead() -> bool:
        looked_at.append(asyncio.get_running_loop().time())
        if not outcomes:
            finished.set()
            return False
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    async def main() -> None:
        keeping = asyncio.create_task(keep_running(restart_if_dead))
        await finished.wait()
        keeping.cancel()
        await asyncio.wait([keeping])
        assert keeping.cancelled()

    run_virtually(main())
    pauses = [later - earlier for earlier, later in pairwise([0.0, *looked_at])]
    assert pauses[:9] == pytest.approx([LOOK_S, 1.0, 2.0, 4.0, 8.0, 16.0, *[LONGEST_PAUSE_S] * 3])
    assert pauses[9:] == pytest.approx([LOOK_S, LOOK_S, 2 * LOOK_S, LOOK_S])


async def test_a_private_server_whose_folder_is_gone_for_a_while_comes_back(folder: Path) -> None:
    inner = folder / "d"
    inner.mkdir()
    server = PrivateServer(inner)
    server.start()
    store = Store(server.url, server)
    server.stop()
    shutil.rmtree(inner)
    with pytest.raises(OSError, match="No such file"):
        store.restart_if_dead()
    inner.mkdir()
    assert store.restart_if_dead()
    assert not store.restart_if_dead()
    store.stop()


def test_the_private_server_ends_with_stop(store: Store, folder: Path) -> None:
    store.stop()
    assert processes.marked(folder.name) == []
    store.stop()


def test_a_private_server_that_cannot_start_says_why(folder: Path) -> None:
    long = folder / ("x" * 100)
    long.mkdir()
    with pytest.raises(InternalError, match="private Valkey server did not start"):
        open_store(StoreConfig(), long)


def test_a_server_that_does_not_answer_is_named_without_its_password(folder: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(ConfigError) as caught:
        open_store(StoreConfig(url=f"redis://me:secret@127.0.0.1:{port}/0"), folder)
    assert caught.value.message.startswith(f"store.url: no Redis server at 127.0.0.1:{port}")
    assert "secret" not in caught.value.message


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1", "redis://:secret/x@127.0.0.1:1", "redis://127.0.0.1:99999"]
)
def test_a_malformed_url_is_refused_without_quoting_it(url: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"store\.url is no address of a Redis server") as caught:
        open_store(StoreConfig(url=url), folder)
    assert "secret" not in caught.value.message


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("unix://{socket}", "{socket} asks for a password"),
        ("unix://:secret@{socket}", "{socket} refuses the password or the user"),
        ("unix://me:secret@{socket}", "{socket} refuses the password or the user"),
        ("unix://{socket}?password=secret", "{socket} refuses the password or the user"),
        ("unix://:right@{socket}?db=99", "{socket} refuses: DB index is out of range"),
    ],
)
def test_a_server_that_refuses_is_not_called_absent(
    url: str, sentence: str, store: Store, folder: Path
) -> None:
    with redis.Redis.from_url(store.url) as client:
        client.config_set("requirepass", "right")
    names = {"socket": folder / "store.sock"}
    with pytest.raises(ConfigError) as caught:
        open_store(StoreConfig(url=url.format(**names)), folder)
    assert caught.value.message.startswith(f"store.url: the Redis server at {sentence.format(**names)}")
    assert "secret" not in caught.value.message
    open_store(StoreConfig(url=f"unix://:right@{names['socket']}"), folder)
