"""`diphase serve` in a process of its own, and a client that follows a request through failures."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from diphase.cluster import processes
from diphase.cluster.generate import stream
from diphase.proto import cluster_pb2
from diphase.proto import inference_pb2 as pb
from diphase.proto.errors import DiphaseError
from google.protobuf.json_format import ParseDict

DIPHASE = (sys.executable, "-P", "-m", "diphase")
START_S = 90.0
STOP_S = 40.0

TINY = (
    "model.name=dummy:tiny",
    "engine.kv_cache_mib=64",
    "router.local_prefill_tokens=0",
    "router.hang_after_s=3",
    "supervisor.gateway_hang_s=3",
)
"""The hand-off's model: small, and never computed on one worker alone. A machine that is busy with other
tests may keep a process waiting for longer than is normal."""


def run(
    *words: str, timeout_s: float = 60.0, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """One command of the command line, to its end."""
    return subprocess.run(
        [*DIPHASE, *words],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env={**os.environ, **(environment or {})},
        check=False,
    )


def settings_words(settings: Sequence[str]) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float) -> None:
    """Returns once `condition` holds; fails after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"still waiting after {timeout_s:.0f} s: {what}"
        time.sleep(0.02)


def command_of(pid: int) -> str:
    """Its command line; empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").replace("\0", " ")
    except OSError:
        return ""


class Served:
    """A cluster that runs. Lines of its output are kept as they come."""

    def __init__(self, *settings: str, **environment: str) -> None:
        self.process = subprocess.Popen(
            [*DIPHASE, "serve", "-v", "--set", "gateway.port=0", *settings_words(settings)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **(environment or {})},
            # Of its own group, as in a terminal: what is meant for pytest does not reach it.
            process_group=0,
        )
        self.lines: list[str] = []
        self._more = threading.Condition()
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self._readers = [
            threading.Thread(target=self._read, args=(pipe,))
            for pipe in (self.process.stdout, self.process.stderr)
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, pipe: IO[str]) -> None:
        for line in pipe:
            with self._more:
                self.lines.append(line.rstrip())
                self._more.notify_all()
        pipe.close()

    def wait_line(self, pattern: str, timeout_s: float = START_S, *, after: int = 0) -> re.Match[str]:
        """The first line from `after` on that has the pattern."""
        found: re.Match[str] | None = None

        def look() -> bool:
            nonlocal found
            found = next(filter(None, (re.search(pattern, line) for line in self.lines[after:])), None)
            return found is not None or self.process.poll() is not None

        with self._more:
            self._more.wait_for(look, timeout_s)
        assert found is not None, f"no line with {pattern!r}:\n" + "\n".join(self.lines[-30:])
        return found

    def ready(self) -> Served:
        self.wait_line(r"^try: diphase generate")
        return self

    @property
    def addresses(self) -> list[str]:
        """Of the gateways."""
        return self.wait_line(r"^serving \S+ with .* on (.+)$")[1].split(", ")

    @property
    def folder(self) -> Path:
        return Path(self.wait_line(r"foundation_begun folder=(\S+)")[1])

    def pid(self, worker_id: str) -> int:
        """Of the newest process of that name."""
        pids = [
            m[1]
            for line in self.lines
            if (m := re.search(rf"process_started worker_id={worker_id} pid=(\d+)", line))
        ]
        return int(pids[-1])

    def status(self) -> dict[str, Any]:
        done = run("status", "--json", "--address", self.addresses[0])
        assert done.returncode == 0, done.stderr
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    def signal_worker(self, worker_id: str, number: signal.Signals) -> int:
        """Sends it; how many lines there were before."""
        before = len(self.lines)
        os.kill(self.pid(worker_id), number)
        return before

    def stop(self, number: signal.Signals = signal.SIGINT) -> int:
        """Signals all of its process group, as a terminal does, and waits for the end; the exit status."""
        os.killpg(self.process.pid, number)
        return self.wait()

    def wait(self) -> int:
        status = self.process.wait(timeout=STOP_S)
        for reader in self._readers:
            reader.join(timeout=STOP_S)
        return status

    def assert_nothing_left(self, timeout_s: float = 10.0) -> None:
        """No process of it, and no file."""
        folder = self.folder
        wait_until(
            lambda: not processes.marked(folder.name) and not folder.exists(),
            f"processes {processes.marked(folder.name)} of {folder}",
            timeout_s,
        )

    def kill(self) -> None:
        """For the end of a test that failed."""
        if self.process.poll() is None:
            self.process.kill()
        self.wait()
        self.assert_nothing_left()


@contextmanager
def served(*settings: str, **environment: str) -> Iterator[Served]:
    """A cluster that is up for the block, stopped as Ctrl-C does, and leaves nothing."""
    cluster = Served(*settings, **environment)
    try:
        yield cluster.ready()
        if cluster.process.poll() is None:
            assert cluster.stop() == 0
        cluster.assert_nothing_left()
    finally:
        cluster.kill()


def idle(cluster: Served) -> bool:
    """Whether no worker has a request or a block in use."""
    status = ParseDict(cluster.status(), cluster_pb2.GetStatusResponse())
    return status.running_requests == status.queued_requests == 0 and all(
        worker.load.blocks_free + worker.load.blocks_cached == worker.load.blocks_total
        for worker in status.workers
    )


def prompt_request(token_ids: Sequence[int], max_tokens: int, request_id: str = "") -> pb.GenerateRequest:
    """Greedy, and exactly `max_tokens` long."""
    return pb.GenerateRequest(
        request_id=request_id,
        token_ids=pb.TokenIds(ids=token_ids),
        sampling=pb.Sampling(max_tokens=max_tokens, ignore_eos=True, temperature=0.0),
    )


class Completion:
    """A request as its client sees it: every token once and in order, or it fails."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.last: pb.GenerateResponse | None = None
        self.attachments = 0
        self._grew = asyncio.Event()

    def take(self, response: pb.GenerateResponse) -> None:
        assert self.last is None, "something came after the end"
        if response.token_ids:
            assert response.index == len(self.token_ids), (
                f"token {response.index} after {len(self.token_ids)}"
            )
        self.token_ids.extend(response.token_ids)
        if response.finish_reason:
            self.last = response
        self._grew.set()

    async def has(self, count: int) -> None:
        """Returns once there are so many tokens."""
        while len(self.token_ids) < count:
            self._grew.clear()
            await self._grew.wait()


async def complete(address: str, request: pb.GenerateRequest) -> Completion:
    """One request to its end."""
    completion = Completion()
    async for response in stream(address, "", request):
        completion.take(response)
    assert completion.last is not None
    return completion


async def follow(addresses: Sequence[str], request: pb.GenerateRequest, completion: Completion) -> None:
    """One request to its end, re-attached through the next gateway whenever the one that has it is lost."""
    while completion.last is None:
        address = addresses[completion.attachments % len(addresses)]
        attach = request
        if completion.attachments:
            attach = pb.GenerateRequest(request_id=request.request_id, resume_from=len(completion.token_ids))
        completion.attachments += 1
        try:
            async for response in stream(address, "", attach):
                completion.take(response)
        except DiphaseError as exc:
            if not exc.retryable and "no gateway answers" not in exc.message:
                raise
            await asyncio.sleep(0.05)
