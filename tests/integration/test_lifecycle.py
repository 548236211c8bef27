"""Starting and stopping: side by side, drained, at once, killed, and what must never start."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from diphase.cluster import processes
from diphase.cluster.generate import stream
from diphase.cluster.store import PrivateServer
from diphase.proto.errors import DiphaseError

from .served import (
    START_S,
    TINY,
    Completion,
    Served,
    command_of,
    complete,
    prompt_request,
    run,
    served,
    settings_words,
    wait_until,
)

ONE = (*TINY, "pools.prefill.workers=0", "pools.decode.workers=0", "pools.colocated.workers=1")
"""The smallest cluster: one worker that does both."""
LONG = 6000
"""Tokens of a request that outlasts what the test does meanwhile."""


def cores_of(pid: int) -> set[int]:
    """Where any of its threads may run."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    return set().union(*(os.sched_getaffinity(int(thread.name)) for thread in threads))


def of_ray(cluster: Served, name: str) -> list[int]:
    """Ids of that native process of its private Ray."""
    return [pid for pid in processes.marked(cluster.folder.name) if f"/{name} " in command_of(pid)]


async def test_two_clusters_run_side_by_side_and_the_stop_of_one_leaves_the_other_alone(
    tmp_path: Path,
) -> None:
    with served(*ONE, "pools.colocated.cores=[0]", f"supervisor.log_dir={tmp_path}") as first:
        with served(*ONE) as second:
            assert first.addresses != second.addresses
            one, two = await asyncio.gather(
                complete(first.addresses[0], prompt_request([1, 2, 3], 5)),
                complete(second.addresses[0], prompt_request([1, 2, 3], 5)),
            )
            assert one.token_ids == two.token_ids
        after = await complete(first.addresses[0], prompt_request([1, 2, 3], 5))
        assert after.token_ids == one.token_ids
        assert cores_of(first.pid("colocated-0")) == {0}
    assert "worker_started worker_id=colocated-0" in (tmp_path / "colocated-0.log").read_text()


@pytest.fixture
def shared_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateServer]:
    """A server that is no cluster's own. Its path is short: a unix socket's has at most 107 bytes."""
    server = PrivateServer(tmp_path_factory.mktemp(f"l{os.getpid()}-"))
    server.start()
    yield server
    server.stop()


async def test_a_second_cluster_of_one_name_on_one_store_is_refused_and_harms_nothing(
    shared_store: PrivateServer,
) -> None:
    settings = (*ONE, f"store.url={shared_store.url}", "name=twin")
    with redis.Redis.from_url(shared_store.url) as store:
        with served(*settings) as first:
            members = store.hgetall("diphase:twin:members")
            second = await asyncio.to_thread(run, "serve", *settings_words([*settings, "gateway.port=0"]))
            assert second.returncode == 2
            assert 'diphase serve: name = "twin": a cluster of that name runs' in second.stderr
            assert store.hgetall("diphase:twin:members") == members
            after = await complete(first.addresses[0], prompt_request([1, 2, 3], 5))
            assert len(after.token_ids) == 5
        assert not store.exists("diphase:twin:supervisor")


async def test_sigterm_lets_running_requests_finish_and_refuses_new_ones() -> None:
    with served(*ONE) as cluster:
        completion = Completion()
        responses = stream(cluster.addresses[0], "", prompt_request([5, 6, 7], 1000))
        completion.take(await anext(responses))
        cluster.process.send_signal(signal.SIGTERM)
        await asyncio.to_thread(cluster.wait_line, "^stopping")
        refused = None
        while refused is None and completion.last is None:
            try:
                await complete(cluster.addresses[0], prompt_request([1], 1))
            except DiphaseError as exc:
                refused = exc
        assert refused is not None
        assert refused.retryable
        async for response in responses:
            completion.take(response)
        assert len(completion.token_ids) == 1000
        assert await asyncio.to_thread(cluster.wait) == 0


async def test_a_second_signal_stops_at_once() -> None:
    with served(*ONE, "gateway.drain_s=600") as cluster:
        responses = stream(cluster.addresses[0], "", prompt_request([5, 6, 7], LONG))
        await anext(responses)
        cluster.process.send_signal(signal.SIGINT)
        await asyncio.to_thread(cluster.wait_line, "^stopping")
        cluster.process.send_signal(signal.SIGINT)
        with pytest.raises(DiphaseError):
            async for _ in responses:
                pass
        assert await asyncio.to_thread(cluster.wait) == 0


def test_a_second_signal_leaves_nothing_not_even_a_stopped_worker() -> None:
    cluster = Served(*ONE).ready()
    try:
        cluster.signal_worker("colocated-0", signal.SIGSTOP)
        cluster.process.send_signal(signal.SIGINT)
        cluster.wait_line("^stopping")
        cluster.process.send_signal(signal.SIGINT)
        assert cluster.wait() == 0
        cluster.assert_nothing_left()
    finally:
        cluster.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_the_start_gives_it_up(number: signal.Signals) -> None:
    cluster = Served(*ONE)
    try:
        # While Ray's own code runs, which would rather take signals itself.
        wait_until(lambda: bool(of_ray(cluster, "gcs_server")), "Ray's first process", START_S)
        assert cluster.stop(number) == 130
        assert "stopping; Ctrl-C again does not wait for running requests" in cluster.lines
        cluster.assert_nothing_left()
    finally:
        cluster.kill()


@pytest.mark.parametrize("to_everything", [False, True])
def test_sigterm_to_more_than_the_supervisor_ends_the_cluster_as_one_to_it_does(to_everything: bool) -> None:
    """`timeout` signals the process group, systemd all that the supervisor has started."""
    cluster = Served(*ONE).ready()
    try:
        for pid in processes.marked(cluster.folder.name) if to_everything else ():
            if pid != cluster.process.pid:
                os.kill(pid, signal.SIGTERM)
        # STOP_S is less than the minute for which Ray looks for what was killed.
        assert cluster.stop(signal.SIGTERM) == 0
        assert "stopped" in cluster.lines
        cluster.assert_nothing_left()
    finally:
        cluster.kill()


def test_nothing_outlives_a_killed_supervisor_not_even_a_stopped_worker() -> None:
    cluster = Served(*ONE).ready()
    try:
        cluster.signal_worker("colocated-0", signal.SIGSTOP)
        cluster.process.kill()
        cluster.wait()
        cluster.assert_nothing_left()
    finally:
        cluster.kill()


@pytest.mark.parametrize("name", ["gcs_server", "raylet"])
def test_a_ray_that_dies_ends_the_cluster_with_one_sentence(name: str) -> None:
    cluster = Served(*ONE).ready()
    try:
        [pid] = of_ray(cluster, name)
        os.kill(pid, signal.SIGKILL)
        assert cluster.wait() == 1
        cluster.wait_line(f"^diphase serve: {name} of this cluster's Ray has died")
        cluster.assert_nothing_left()
    finally:
        cluster.kill()


@pytest.fixture
def taken_port() -> Iterator[int]:
    """A port that somebody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield int(listener.getsockname()[1])


@pytest.fixture
def incomplete_model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("model.name=no-such-model", "there is no model 'no-such-model'"),
        ("model.name={model}", "{model}"),
        ("gateway.port={port}", "cannot listen on 127.0.0.1:{port}: Address already in use"),
        ("store.url=redis://127.0.0.1:1", "store.url: no Redis server at 127.0.0.1:1"),
        ("ray.address=127.0.0.1:1", "nothing answers there"),
        ("pools.decode.gpus=3", "no room for 1 workers"),
        ("kv_transfer.transport=pigeon", "'pigeon' is unknown"),
        (
            "pools.decode.cores=[0, 9999]",
            "decode-0: pools.decode.cores: there is no core 9999 here; the cores are 0",
        ),
        ("pools.prefill.workers=two", "must be an integer"),
    ],
)
def test_what_cannot_work_is_one_sentence_and_leaves_nothing(
    setting: str, sentence: str, taken_port: int, incomplete_model: Path
) -> None:
    names = {"port": taken_port, "model": incomplete_model}
    settings = [*TINY, "gateway.port=0", "ray.placement_timeout_s=3", setting.format(**names)]
    done = run("serve", "-v", *settings_words(settings))
    assert done.returncode == 2
    *log, complaint = done.stderr.splitlines()
    assert complaint.startswith("diphase serve: ")
    assert sentence.format(**names) in complaint
    assert not any("diphase serve: " in line for line in log)
    for folder in re.findall(r"foundation_begun folder=(\S+)", done.stderr):
        assert not Path(folder).exists()
        assert processes.marked(Path(folder).name) == []


def test_the_demonstration_of_the_real_model_succeeds() -> None:
    done = run("demo", timeout_s=150.0)
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    assert "prefill-0" in done.stdout
    assert "TTFT" in done.stdout
    assert "stopped; nothing is left running" in done.stdout
