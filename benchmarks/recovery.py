"""How soon a dead or hung process is noticed and replaced, and how long its clients pause.

    .venv/bin/python -P benchmarks/recovery.py   # about six minutes; writes docs/results/recovery.json

A cluster of two workers of each kind and two gateways, with default settings, streams tokens to a client
while a process that serves it is killed or stopped. From the signal on: when a gateway no longer calls the
worker ready (its requests are tried elsewhere from there on), when the process is gone, when its successor is
ready; and the longest gap between two tokens of the client; when a prefill worker is hit, token 0."""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import re
import signal
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from diphase.benchmarks import harness
from diphase.cluster import processes
from diphase.cluster.endpoint import StatusClient
from diphase.cluster.generate import stream
from diphase.cluster.load.served import SERVE, serving
from diphase.proto import inference_pb2 as pb
from diphase.proto.errors import DiphaseError

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "recovery.json"
SETTINGS = (
    "pools.prefill.workers=2",
    "pools.decode.workers=2",
    "pools.prefill.cpus=0.25",
    "pools.decode.cpus=0.25",
    "gateway.replicas=2",
    "router.local_prefill_tokens=0",
)
VICTIMS = ("prefill", "decode", "gateway")
SIGNALS = (signal.SIGKILL, signal.SIGSTOP)
PROMPT_TOKENS = 1500
MAX_TOKENS = 200
STRIKE_AFTER = 20
"""Tokens: the client's worker is decoding by then."""
LOOK_EVERY_S = 0.02
GIVE_UP_S = 120.0


@dataclass(slots=True)
class Client:
    """One request, followed through the loss of its gateway."""

    addresses: list[str]
    arrivals: list[float] = field(default_factory=list)
    grew: asyncio.Event = field(default_factory=asyncio.Event)
    last: pb.GenerateResponse | None = None

    async def run(self, request: pb.GenerateRequest) -> None:
        attempt = 0
        while self.last is None:
            if attempt:
                request = pb.GenerateRequest(request_id=request.request_id, resume_from=len(self.arrivals))
            try:
                async for response in stream(self.addresses[attempt % len(self.addresses)], "", request):
                    self.arrivals += [time.monotonic()] * len(response.token_ids)
                    self.grew.set()
                    if response.finish_reason:
                        self.last = response
            except DiphaseError as exc:
                if not exc.retryable and "no gateway answers" not in exc.message:
                    raise
                await asyncio.sleep(LOOK_EVERY_S)
            attempt += 1

    async def has(self, count: int) -> None:
        while len(self.arrivals) < count:
            self.grew.clear()
            await self.grew.wait()

    def longest_gap(self) -> float:
        return max(b - a for a, b in zip(self.arrivals, self.arrivals[1:], strict=False))


def started(log: Path, name: str) -> int:
    """Process id of the newest process of that name."""
    return int(re.findall(rf"process_started worker_id={name} pid=(\d+)", log.read_text())[-1])


def gateways(log: Path) -> list[str]:
    """Their addresses, once each of them reaches every worker."""
    end = time.monotonic() + GIVE_UP_S
    while (found := re.search(r"^serving \S+ with .* on (.+)\ntry: ", log.read_text(), re.MULTILINE)) is None:
        if time.monotonic() > end:
            raise TimeoutError("the cluster does not become ready")
        time.sleep(LOOK_EVERY_S)
    return found[1].split(", ")


async def state_of(status: StatusClient, address: str, name: str) -> str:
    """As the gateway calls it; empty when it does not know the worker or does not answer."""
    try:
        view = await status.ask(address, GIVE_UP_S)
    except (TimeoutError, DiphaseError):
        return ""
    if name == view.gateway_id:
        return "ready"
    return next((worker.state for worker in view.workers if worker.worker_id == name), "")


async def strike(log: Path, victim: str, number: signal.Signals, rng: random.Random) -> dict[str, float]:
    """One blow; seconds by what was seen."""
    addresses = gateways(log)
    status = StatusClient("")
    client = Client(addresses)
    request = pb.GenerateRequest(
        request_id=f"recovery-{rng.getrandbits(60):x}",
        token_ids=pb.TokenIds(ids=[rng.randrange(16, 49_152) for _ in range(PROMPT_TOKENS)]),
        sampling=pb.Sampling(max_tokens=MAX_TOKENS, ignore_eos=True),
    )
    running = asyncio.create_task(client.run(request))
    found: dict[str, float] = {}
    if victim == "prefill":
        # Its part ends with the hand-off: the blow falls while it computes.
        name = await busy_worker(status, addresses[1], "prefill")
    else:
        await client.has(STRIKE_AFTER)
        name = "gateway-0" if victim == "gateway" else await busy_worker(status, addresses[1], "decode")
    pid = started(log, name)
    os.kill(pid, number)
    at = time.monotonic()
    look_at = addresses[0] if victim == "gateway" else addresses[1]
    while time.monotonic() - at < GIVE_UP_S and "back_s" not in found:
        gone = processes.started_at(pid) is None
        if gone:
            found.setdefault("gone_s", time.monotonic() - at)
        if victim != "gateway" or gone:
            ready = await state_of(status, look_at, name) == "ready"
            if not ready and victim != "gateway":
                found.setdefault("noticed_s", time.monotonic() - at)
            if ready and gone and (victim == "gateway" or "noticed_s" in found):
                found["back_s"] = time.monotonic() - at
        await asyncio.sleep(LOOK_EVERY_S)
    await running
    await status.close()
    assert len(client.arrivals) == MAX_TOKENS
    if victim == "prefill":
        found["token_0_s"] = client.arrivals[0] - at
    return {**found, "longest_gap_s": client.longest_gap()}


async def busy_worker(status: StatusClient, address: str, role: str) -> str:
    """The worker of that role that has the request, once one does."""
    while True:
        view = await status.ask(address, GIVE_UP_S)
        for worker in view.workers:
            if worker.role == role and worker.load.running:
                return str(worker.worker_id)
        await asyncio.sleep(LOOK_EVERY_S)


async def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    rng = random.Random(0)
    blows: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "serve.log"
        async with serving(SETTINGS, log, command=(*SERVE, "-v")):
            for _ in range(args.rounds):
                for victim in VICTIMS:
                    for number in SIGNALS:
                        found = await strike(log, victim, number, rng)
                        blows.setdefault(f"{victim} {number.name}", []).append(found)
                        print(f"{victim} {number.name}", {k: round(v, 2) for k, v in found.items()})
    medians = {
        blow: {key: round(statistics.median(run[key] for run in runs), 2) for key in runs[0]}
        for blow, runs in blows.items()
    }
    worst = {
        blow: {key: round(max(run[key] for run in runs), 2) for key in runs[0]}
        for blow, runs in blows.items()
    }
    harness.write_result(args.output, {"seconds_after": "the signal", "medians": medians, "worst": worst})


if __name__ == "__main__":
    harness.run(main())
