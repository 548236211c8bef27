"""`diphase demo`, which `make run` calls: a whole cluster for three prompts, with what it measured.

It succeeds only when every answer came, each prompt was computed in one process and its tokens in another,
and KV bytes moved between them.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys

from rich.console import Console

from ..proto import inference_pb2 as pb
from ..proto.errors import InternalError
from .config import ClusterConfig
from .generate import print_stream, stream
from .serve import StopSignals
from .supervisor import Cluster, running, until
from .terminal import StartDisplay, stages_table

TIMEOUT_S = 120.0

FACT = "The capital of France is"
STORY = "Once upon a time, a lighthouse keeper found a letter in a bottle. It said:"
QUESTION = "Explain in two sentences why the sky is blue."


def requests() -> list[tuple[str, pb.GenerateRequest]]:
    """What is sent, each with the words it is shown under."""
    chat = pb.Chat(messages=[pb.ChatMessage(role="user", content=QUESTION)])
    one_line = pb.Sampling(max_tokens=16, stop=["\n"])
    return [
        (FACT, pb.GenerateRequest(prompt=FACT, sampling=one_line)),
        (STORY, pb.GenerateRequest(prompt=STORY, sampling=pb.Sampling(max_tokens=60))),
        (f"chat: {QUESTION}", pb.GenerateRequest(chat=chat, sampling=pb.Sampling(max_tokens=64))),
    ]


async def demo(config: ClusterConfig, console: Console) -> int:
    """Starts, asks, prints, stops; the exit status.

    Raises:
        DiphaseError: something of that did not happen; the message says what.
    """
    stop = StopSignals()
    with stop.installed():
        async with contextlib.AsyncExitStack() as stack:
            with StartDisplay(console) as display:
                cluster = await until(
                    stop.drain, stack.enter_async_context(running(config, display.report, stop.now))
                )
            if cluster is None:
                return 130
            finished = await until(stop.drain, _ask_all(cluster, console))
        if finished is None:
            return 130
    console.print("stopped; nothing is left running")
    return 0


async def _ask_all(cluster: Cluster, console: Console) -> bool:
    pids = {slot.started.worker_id: slot.started.pid for slot in cluster.slots if slot.started is not None}
    shown = ", ".join(f"{worker_id} (pid {pid})" for worker_id, pid in pids.items())
    console.print(f"serving {cluster.config.model.name} on {cluster.addresses[0]}: {shown}", highlight=False)
    finished = []
    for title, request in requests():
        console.print(f"\n[bold cyan]{title}[/]", highlight=False)
        async with asyncio.timeout(TIMEOUT_S):
            responses = stream(cluster.addresses[0], cluster.config.security.cluster_token, request)
            last = await print_stream(responses, _write)
        _write("\n")
        _check(last, pids)
        finished.append(last)
    console.print()
    console.print(stages_table(finished))
    return True


def _check(last: pb.GenerateResponse, pids: dict[str, int]) -> None:
    stages = last.stages
    if last.finish_reason == pb.FINISH_REASON_UNSPECIFIED or not last.usage.completion_tokens:
        raise InternalError("an answer ended without a reason")
    if pids.get(stages.prefill_worker) in (None, pids.get(stages.decode_worker)):
        raise InternalError(
            f"prompt and tokens came from one process: {stages.prefill_worker}, {stages.decode_worker}"
        )
    if not stages.handoff_bytes:
        raise InternalError(f"no KV moved from {stages.prefill_worker} to {stages.decode_worker}")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
