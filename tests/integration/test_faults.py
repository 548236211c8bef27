"""Processes are killed and stopped while they serve: no token is lost or repeated, and everybody comes back.

The model computes in fp32: an attempt that starts anew computes by prefill what was decoded before, and its
rounding must not decide between two tokens.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import Iterator

import pytest
from diphase.cluster import processes
from diphase.engine.config import EngineConfig
from diphase.engine.engine import TorchEngine
from diphase.engine.generate import generate
from diphase.proto.sampling import SamplingParams

from .served import TINY, Completion, Served, command_of, follow, prompt_request, served, wait_until
from .test_serving import idle

NUM_REQUESTS = 6
MAX_TOKENS = 200
RECOVER_S = 60.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[Served]:
    """Two of each kind, so that somebody can take over."""
    settings = ("pools.prefill.workers=2", "pools.decode.workers=2", "gateway.replicas=2", "model.dtype=fp32")
    with served(*TINY, *settings, "pools.prefill.cpus=0.5", "pools.decode.cpus=0.5") as cluster:
        yield cluster


@pytest.fixture(scope="module")
def engine() -> Iterator[TorchEngine]:
    """To say what an undisturbed request gives."""
    engine = TorchEngine.load(EngineConfig(model="dummy:tiny", dtype="fp32", kv_cache_mib=64))
    yield engine
    engine.close()


def draw_prompts(seed: int) -> list[list[int]]:
    """Of another seed than any other test's: nobody has them cached."""
    rng = random.Random(seed)
    return [[rng.randrange(512) for _ in range(600 + 200 * i)] for i in range(NUM_REQUESTS)]


def expected(engine: TorchEngine, prompts: list[list[int]]) -> list[list[int]]:
    tokens = generate(engine, prompts, SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True))
    return [[token.token_id for token in completion] for completion in tokens]


async def ready(cluster: Served, worker_id: str) -> None:
    """Returns once gateway 0 has a stream to the worker."""

    def states() -> dict[str, str]:
        return {worker["worker_id"]: worker["state"] for worker in cluster.status()["workers"]}

    await asyncio.to_thread(wait_until, lambda: states().get(worker_id) == "ready", f"{worker_id} ready", 15)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
@pytest.mark.parametrize(("victim", "seed"), [("prefill-0", 0), ("decode-0", 10), ("gateway-0", 20)])
async def test_every_request_ends_with_the_tokens_it_would_have_had(
    cluster: Served, engine: TorchEngine, victim: str, seed: int, number: signal.Signals
) -> None:
    prompts = draw_prompts(seed + number)
    addresses = cluster.addresses
    before = cluster.pid(victim)
    completions = [Completion() for _ in range(NUM_REQUESTS)]
    async with asyncio.timeout(RECOVER_S), asyncio.TaskGroup() as group:
        for i, prompt in enumerate(prompts):
            request = prompt_request(prompt, MAX_TOKENS, request_id=f"{victim}-{number.name}-{i}")
            # All through gateway 0: it is one of the victims.
            group.create_task(follow(addresses, request, completions[i]))
        # While prompts are computed, or once everybody decodes.
        for completion in completions[:1] if victim == "prefill-0" else completions:
            await completion.has(1)
        line = cluster.signal_worker(victim, number)
    assert [completion.token_ids for completion in completions] == expected(engine, prompts)
    if victim == "gateway-0":
        assert all(completion.attachments > 1 for completion in completions)
    else:
        assert any(completion.last and completion.last.stages.attempts > 1 for completion in completions)
    # It comes back under its name and address, as another process.
    await asyncio.to_thread(cluster.wait_line, rf"process_started worker_id={victim} ", 60.0, after=line)
    assert cluster.pid(victim) != before
    assert processes.started_at(before) is None
    assert cluster.addresses == addresses
    if victim != "gateway-0":
        await ready(cluster, victim)
    await asyncio.to_thread(wait_until, lambda: idle(cluster), "every block to be free or cached", 30)


async def test_a_dead_store_stops_no_request_and_comes_back(cluster: Served, engine: TorchEngine) -> None:
    prompts = draw_prompts(90)[:1]
    [store] = [pid for pid in processes.marked(cluster.folder.name) if "valkey-server" in command_of(pid)]
    completion = Completion()
    async with asyncio.timeout(RECOVER_S), asyncio.TaskGroup() as group:
        request = prompt_request(prompts[0], MAX_TOKENS, request_id="storeless")
        group.create_task(follow(cluster.addresses, request, completion))
        await completion.has(20)
        line = len(cluster.lines)
        os.kill(store, signal.SIGKILL)
    assert [completion.token_ids] == expected(engine, prompts)
    assert completion.attachments == 1
    await asyncio.to_thread(cluster.wait_line, "store_restarted", 15.0, after=line)
    await asyncio.to_thread(cluster.signal_worker, "prefill-1", signal.SIGKILL)
    await asyncio.to_thread(cluster.wait_line, "process_started worker_id=prefill-1 ", 60.0, after=line)
    await ready(cluster, "prefill-1")
