from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from diphase.cluster import processes
from diphase.cluster.config import StoreConfig
from diphase.cluster.store import Store, open_store
from diphase.proto.errors import ConfigError, InternalError


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


def test_a_url_of_another_kind_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"store\.url is no address of a Redis server"):
        open_store(StoreConfig(url="http://127.0.0.1"), folder)
