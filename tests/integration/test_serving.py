"""A disaggregated cluster of real processes: its output, its view of itself, what a client may do to it."""

from __future__ import annotations

import asyncio
import json
import random
import re
import statistics
import time
from pathlib import Path

import pytest
from diphase.cluster.endpoint import open_channel
from diphase.cluster.generate import stream
from diphase.engine.config import EngineConfig
from diphase.engine.engine import TorchEngine
from diphase.engine.generate import generate
from diphase.proto import cluster_pb2
from diphase.proto import inference_pb2 as pb
from diphase.proto.errors import InvalidRequest
from diphase.proto.inference_pb2_grpc import InferenceStub
from diphase.proto.sampling import SamplingParams
from diphase.proto.worker_pb2 import TransferFigures
from google.protobuf.json_format import ParseDict

from .served import Completion, Served, complete, follow, idle, prompt_request, run, wait_until


def prompts(lengths: list[int], seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(512) for _ in range(length)] for length in lengths]


def test_the_command_line_streams_text(cluster: Served) -> None:
    done = run("generate", "hello", "--max-tokens", "8", "--address", cluster.addresses[0], "--stages")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert re.search(r"prefilled by\W+prefill-0\W", done.stderr)
    assert re.search(r"decoded by\W+decode-0\W", done.stderr)


async def test_a_prompt_is_computed_in_one_process_and_its_tokens_in_another(cluster: Served) -> None:
    [prompt] = prompts([100], seed=1)
    last = (await complete(cluster.addresses[0], prompt_request(prompt, 10))).last
    assert last is not None
    assert last.usage.prompt_tokens == 100
    assert last.usage.completion_tokens == 10
    stages = last.stages
    assert cluster.pid(stages.prefill_worker) != cluster.pid(stages.decode_worker)
    # 100 tokens are six full blocks and a part; a block of the model is 16 KiB.
    assert stages.handoff_bytes == 7 * 16 * 1024
    parts = (
        stages.tokenise_ms
        + stages.placement_ms
        + stages.prefill_queue_ms
        + stages.prefill_ms
        + stages.delivery_ms
    )
    assert stages.ttft_ms == pytest.approx(parts, abs=0.01)


async def test_a_request_can_be_traced_from_its_receipt_to_its_verified_blocks(
    cluster: Served, tmp_path: Path
) -> None:
    [prompt] = prompts([1100], seed=21)
    done = await complete(cluster.addresses[0], prompt_request(prompt, 4))
    assert done.last is not None
    request_id = done.last.request_id
    shown = await asyncio.to_thread(run, "trace", request_id, "--address", cluster.addresses[0])
    assert shown.returncode == 0, shown.stderr
    lines = shown.stdout.splitlines()[2:]
    wanted = [
        r"gateway-\S+ +request: tokenise",
        r"prefill-0 +request: prefill",
        r"prefill-0 +hand-off, attempt 0: peer granted",
        r"prefill-0 +hand-off, attempt 0: push .*num_layers=",
        r"decode-0 +hand-off, attempt 0: verify .*intact=True",
        r"decode-0 +request: first decode",
    ]
    found = [next(i for i, line in enumerate(lines) if re.search(pattern, line)) for pattern in wanted]
    assert found == sorted(found), "in order of their beginning"
    assert sum("push" in line for line in lines) > 1, "layers were pushed as they were computed"
    file = tmp_path / "trace.json"
    chrome = await asyncio.to_thread(
        run, "trace", request_id, "--address", cluster.addresses[0], "--chrome", str(file)
    )
    assert chrome.returncode == 0, chrome.stderr
    events = json.loads(file.read_text())["traceEvents"]
    names = {event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert {"prefill-0", "decode-0"} < names
    spans = {event["name"]: event for event in events if event["ph"] == "X"}
    assert spans["prefill"]["ts"] <= spans["push"]["ts"] < spans["hand-off"]["ts"] + spans["hand-off"]["dur"]
    unknown = await asyncio.to_thread(run, "trace", "nobody", "--address", cluster.addresses[0])
    assert unknown.returncode == 2
    assert "knows no request 'nobody'" in unknown.stderr


async def test_the_status_shows_what_was_transferred_between_whom(cluster: Served) -> None:
    [prompt] = prompts([200], seed=22)
    before = transfers_of(cluster)
    await complete(cluster.addresses[0], prompt_request(prompt, 4))
    await asyncio.to_thread(wait_until, lambda: idle(cluster), "the request to be over", 15)
    after = transfers_of(cluster)
    moved = 13 * 16 * 1024
    for worker, peer in (("prefill-0", "decode-0"), ("decode-0", "prefill-0")):
        old, new = before.get((worker, peer)), after[worker, peer]
        assert new.transfers - (old.transfers if old else 0) == 1
        assert new.bytes - (old.bytes if old else 0) == moved
        assert new.transport == "shm"
        assert not new.failures
    assert after["prefill-0", "decode-0"].wire_s > 0.0
    assert after["decode-0", "prefill-0"].verify_s > 0.0
    shown = await asyncio.to_thread(run, "status", "--address", cluster.addresses[0])
    assert re.search(r"prefill-0 → decode-0 +shm +\d+ ", shown.stdout)


def transfers_of(cluster: Served) -> dict[tuple[str, str], TransferFigures]:
    """(worker, its peer) -> what the worker says of it."""
    status = ParseDict(cluster.status(), cluster_pb2.GetStatusResponse())
    return {(w.worker_id, peer.peer): peer for w in status.workers for peer in w.transfers}


async def test_a_clients_own_ttft_agrees_with_the_servers_within_5_percent(cluster: Served) -> None:
    """The median of several, of prompts long enough that a scheduler's whim is no twentieth of them."""
    ratios = []
    for prompt in prompts([4000] * 5, seed=11):
        sent_at = time.monotonic()
        first_at, last = 0.0, None
        async for response in stream(cluster.addresses[0], "", prompt_request(prompt, 4)):
            first_at = first_at or time.monotonic()
            last = response
        assert last is not None
        ratios.append((first_at - sent_at) * 1000.0 / last.stages.ttft_ms)
    assert statistics.median(ratios) == pytest.approx(1.0, abs=0.05)


async def test_output_equals_the_single_engine_token_for_token(cluster: Served) -> None:
    batch = prompts([1, 2, 15, 16, 17, 64, 200, 511, 700], seed=2)
    engine = TorchEngine.load(EngineConfig(model="dummy:tiny", kv_cache_mib=64))
    try:
        truth = generate(engine, batch, SamplingParams(max_tokens=24, ignore_eos=True))
    finally:
        engine.close()
    async with asyncio.TaskGroup() as group:
        running = [
            group.create_task(complete(cluster.addresses[i % 2], prompt_request(prompt, 24)))
            for i, prompt in enumerate(batch)
        ]
    assert [task.result().token_ids for task in running] == [[t.token_id for t in tokens] for tokens in truth]


async def test_a_client_re_attaches_through_the_other_gateway(cluster: Served) -> None:
    [prompt] = prompts([40], seed=3)
    whole = await complete(cluster.addresses[0], prompt_request(prompt, 200))
    request = prompt_request(prompt, 200, request_id="moved")
    completion = Completion()
    responses = stream(cluster.addresses[0], "", request)
    async for response in responses:
        completion.take(response)
        if len(completion.token_ids) >= 20:
            break
    # The first stream stays open: a client that leaves cancels its request.
    completion.attachments = 1
    async with asyncio.timeout(30):
        await follow(cluster.addresses, request, completion)
    await responses.aclose()
    assert completion.token_ids == whole.token_ids


async def test_a_client_that_leaves_frees_everything(cluster: Served) -> None:
    def cancelled() -> int:
        return int(cluster.status().get("requests_by_slo", {}).get("cancelled", 0))

    [prompt] = prompts([300], seed=4)
    before = await asyncio.to_thread(cancelled)
    responses = stream(cluster.addresses[0], "", prompt_request(prompt, 4000))
    async for response in responses:
        if response.index > 5:
            break
    await responses.aclose()
    await asyncio.to_thread(wait_until, lambda: cancelled() == before + 1, "the cancel to be counted", 15)
    await asyncio.to_thread(wait_until, lambda: idle(cluster), "blocks of a cancelled request", 15)


async def test_the_cluster_says_what_it_is(cluster: Served) -> None:
    status = ParseDict(cluster.status(), cluster_pb2.GetStatusResponse())
    assert {(worker.worker_id, worker.role, worker.state) for worker in status.workers} == {
        ("prefill-0", "prefill", "ready"),
        ("decode-0", "decode", "ready"),
    }
    async with open_channel(cluster.addresses[1]) as channel:
        model = await InferenceStub(channel).GetModel(pb.GetModelRequest(), timeout=5)
    assert model.model == "dummy:tiny"
    assert model.has_chat_template


@pytest.mark.parametrize(
    "request_",
    [
        pb.GenerateRequest(prompt=""),
        pb.GenerateRequest(token_ids=pb.TokenIds(ids=[512])),
        pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1] * 9000)),
        pb.GenerateRequest(prompt="x", sampling=pb.Sampling(top_p=2.0)),
        pb.GenerateRequest(prompt="x", slo=pb.Slo(ttft_ms=-1)),
    ],
    ids=["empty", "unknown token", "too long", "top_p", "slo"],
)
async def test_bad_requests_are_refused_and_cost_nothing(
    cluster: Served, request_: pb.GenerateRequest
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await complete(cluster.addresses[0], request_)
    assert caught.value.message
    assert idle(cluster)
