"""Processes are killed and stopped while they serve: no token is lost or repeated, and everybody comes back.

The model computes in fp32: an attempt that starts anew computes by prefill what was decoded before, and its
rounding must not decide between two tokens.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections import Counter
from collections.abc import Iterator

import pytest
from diphase.cluster import processes
from diphase.cluster.endpoint import open_channel
from diphase.engine.engine import TorchEngine
from diphase.engine.generate import generate
from diphase.proto.inference_pb2_grpc import InferenceStub
from diphase.proto.sampling import SamplingParams
from diphase.proto.slo import Verdict

from .served import TINY, Completion, Served, command_of, follow, idle, prompt_request, served, wait_until

NUM_REQUESTS = 6
MAX_TOKENS = 200
RECOVER_S = 60.0
TRIES = 4
STORM = 1000
STORM_TOKENS = 24
ENDLESS_TOKENS = 8000
FINISHED = (Verdict.MET, Verdict.TTFT, Verdict.TPOT, Verdict.BOTH)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Served]:
    """Two of each kind, so that somebody can take over."""
    settings = ("pools.prefill.workers=2", "pools.decode.workers=2", "gateway.replicas=2", "model.dtype=fp32")
    with served(*TINY, *settings, "pools.prefill.cpus=0.5", "pools.decode.cpus=0.5") as cluster:
        yield cluster


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
@pytest.mark.parametrize(("victim", "seed"), [("prefill-0", 0), ("decode-0", 100), ("gateway-0", 200)])
async def test_every_request_ends_with_the_tokens_it_would_have_had(
    cluster: Served, engine: TorchEngine, victim: str, seed: int, number: signal.Signals
) -> None:
    # Who has which request when the signal comes is chance: again, until somebody was hit.
    for attempt in range(TRIES):
        if await strike(cluster, engine, victim, number, draw_prompts(seed + 10 * attempt + number)):
            return
    pytest.fail(f"{victim} had no request in any of {TRIES} tries")


async def strike(
    cluster: Served, engine: TorchEngine, victim: str, number: signal.Signals, prompts: list[list[int]]
) -> bool:
    """Signals the victim while it serves, and checks that all is well afterwards; whether a request was
    hit."""
    addresses = cluster.addresses
    before = cluster.pid(victim)
    completions = [Completion() for _ in prompts]
    async with asyncio.timeout(RECOVER_S), asyncio.TaskGroup() as group:
        for prompt, completion in zip(prompts, completions, strict=True):
            request = prompt_request(prompt, MAX_TOKENS, request_id=f"{victim}-{before}-{len(prompt)}")
            # All through gateway 0: it is one of the victims.
            group.create_task(follow(addresses, request, completion))
        # While prompts are computed; or while several decode, the first of them not yet at its end.
        for completion in completions[: 1 if victim == "prefill-0" else 3]:
            await completion.has(1)
        line = cluster.signal_worker(victim, number)
    assert [completion.token_ids for completion in completions] == expected(engine, prompts)
    # It comes back under its name and address, as another process.
    await asyncio.to_thread(cluster.wait_line, rf"process_started worker_id={victim} ", 60.0, after=line)
    assert cluster.pid(victim) != before
    assert processes.started_at(before) is None
    assert cluster.addresses == addresses
    if victim != "gateway-0":
        await ready(cluster, victim)
    await asyncio.to_thread(wait_until, lambda: idle(cluster), "every block to be free or cached", 30)
    if victim == "gateway-0":
        return any(completion.attachments > 1 for completion in completions)
    return any(completion.last and completion.last.stages.attempts > 1 for completion in completions)


def settled(cluster: Served) -> Counter[str]:
    """Terminal events that gateway 0 has counted: finished (whatever the verdict), cancelled, rejected,
    error."""
    counts: Counter[str] = Counter()
    for verdict, count in cluster.status().get("requests_by_slo", {}).items():
        counts["finished" if verdict in FINISHED else verdict] += int(count)
    return counts


async def test_a_thousand_requests_with_cancels_and_deaths_each_end_once(
    cluster: Served, engine: TorchEngine
) -> None:
    rng = random.Random(5)
    prompts = [[rng.randrange(512) for _ in range(rng.randrange(1, 120))] for _ in range(40)]
    # A client that leaves does so after so many tokens. It had asked for all that fit: what this process
    # reads late on a busy machine must not make the request finish before its cancel arrives.
    leaves = {i: rng.randrange(20) for i in rng.sample(range(STORM), STORM // 5)}
    truth = expected(engine, prompts)
    before = await asyncio.to_thread(settled, cluster)
    places = asyncio.Semaphore(24)
    ended = 0
    deaths = {STORM // 4: "prefill-0", STORM // 2: "decode-0", 3 * STORM // 4: "prefill-1"}

    async def one(stub: InferenceStub, i: int) -> Completion:
        nonlocal ended
        completion = Completion()
        max_tokens = ENDLESS_TOKENS if i in leaves else STORM_TOKENS
        async with places:
            call = stub.Generate(prompt_request(prompts[i % 40], max_tokens, request_id=f"storm-{i}"))
            async for response in call:
                completion.take(response)
                if len(completion.token_ids) > leaves.get(i, max_tokens):
                    call.cancel()
                    break
            else:
                assert completion.last is not None
        ended += 1
        if victim := deaths.get(ended):
            cluster.signal_worker(victim, signal.SIGKILL)
        return completion

    async with asyncio.timeout(3 * RECOVER_S), open_channel(cluster.addresses[0]) as channel:
        stub = InferenceStub(channel)
        async with asyncio.TaskGroup() as group:
            requests = [group.create_task(one(stub, i)) for i in range(STORM)]
    completions = [request.result() for request in requests]
    for i, completion in enumerate(completions):
        assert completion.token_ids == truth[i % 40][: len(completion.token_ids)]
        assert (completion.last is None) == (i in leaves)
        assert len(completion.token_ids) == STORM_TOKENS or i in leaves
    for victim in deaths.values():
        await ready(cluster, victim)
    await asyncio.to_thread(wait_until, lambda: idle(cluster), "every block to be free or cached", 30)
    seen = Counter("finished" if completion.last else "cancelled" for completion in completions)
    assert await asyncio.to_thread(settled, cluster) - before == seen


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
