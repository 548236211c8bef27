"""Pools of different tensor parallelism: the KV of two ranks goes to one, of one to two or four, and the
output is the single engine's, token for token.

In fp32: in bf16 the sum of two parts rounds differently from the whole, which may decide between two tokens.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator

import pytest
from diphase.cluster import processes
from diphase.engine.engine import TorchEngine
from diphase.proto.sampling import SamplingParams

from ..live_workers import rank_pids
from .pair import run_pair
from .served import TINY, Completion, Served, complete, follow, idle, prompt_request, served, wait_until
from .test_equivalence import prompts, truth

NUM_TOKENS = 16
LENGTHS = (1, 15, 16, 17, 130, 511, 1500)


@pytest.mark.parametrize(
    ("ranks", "transport", "staging"),
    [
        ((2, 1), "shm", "auto"),
        ((1, 2), "tcp", "auto"),
        ((2, 2), "shm", "never"),
        ((2, 1), "tcp", "never"),
        ((1, 4), "shm", "always"),
        ((4, 2), "tcp", "auto"),
    ],
    ids=str,
)
async def test_pools_of_any_two_sizes_give_the_single_engines_tokens(
    engine: TorchEngine, ranks: tuple[int, int], transport: str, staging: str
) -> None:
    """The model has two KV heads: four ranks keep two copies of each."""
    of = prompts(LENGTHS, engine.limits.vocab_size, seed=sum(ranks))
    params = [SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)] * len(of)
    outputs, _ = await run_pair(
        of,
        params,
        transport=transport,
        chunk_budget=512,
        batch=4,
        dtype="fp32",
        tensor_parallel=ranks,
        staging=staging,
        layerwise_tokens=256,
        layers_per_push=1,
    )
    assert outputs == truth(engine, of, params)
    assert not rank_pids()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Served]:
    settings = ("pools.prefill.tensor_parallel=2", "model.dtype=fp32", "engine.rank_timeout_s=2")
    with served(*TINY, *settings) as cluster:
        yield cluster


@pytest.mark.parametrize(
    "number", [None, signal.SIGKILL, signal.SIGSTOP], ids=["served", "killed", "stopped"]
)
async def test_a_live_cluster_serves_and_a_worker_that_loses_a_rank_starts_anew(
    cluster: Served, engine: TorchEngine, number: signal.Signals | None
) -> None:
    of = prompts((100, 700, 2000), engine.limits.vocab_size, seed=number or 0)
    params = [SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)] * len(of)
    before = cluster.pid("prefill-0")
    (rank,) = rank_pids(before)
    line = len(cluster.lines)
    if number is not None:
        os.kill(rank, number)
    completions = [Completion() for _ in of]
    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        for i, (prompt, completion) in enumerate(zip(of, completions, strict=True)):
            request = prompt_request(prompt, NUM_TOKENS, request_id=f"r{number}-{i}")
            group.create_task(follow(cluster.addresses, request, completion))
    assert [completion.token_ids for completion in completions] == truth(engine, of, params)
    if number is None:
        assert all(c.last and c.last.stages.prefill_worker == "prefill-0" for c in completions)
    else:
        await asyncio.to_thread(cluster.wait_line, r"process_started worker_id=prefill-0 ", 60.0, after=line)
        assert cluster.pid("prefill-0") != before
        assert processes.started_at(rank) is None
        assert len(rank_pids(cluster.pid("prefill-0"))) == 1
        again = await complete(cluster.addresses[0], prompt_request(of[0], NUM_TOKENS))
        assert again.token_ids == completions[0].token_ids
    await asyncio.to_thread(wait_until, lambda: idle(cluster), "every block to be free or cached", 30)
