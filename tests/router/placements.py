"""Hand-made workers and demands for tests of placement."""

from __future__ import annotations

import random
from collections.abc import Sequence

from diphase.proto import worker_pb2 as wpb
from diphase.proto.slo import Slo
from diphase.router.latency_model import LatencyModel
from diphase.router.membership import Member
from diphase.router.placement import Demand, Placement
from diphase.router.prompt_hashes import PromptHashes
from diphase.router.step_time import StepShape
from diphase.router.worker_handle import WorkerHandle, WorkerState

from .shapes import prompt_shape

PROMPT = list(range(400))


def step_times() -> LatencyModel:
    """0.5 ms a prompt token; decode 10 ms + 1 ms a sequence + 5 us a token of context."""
    model = LatencyModel()
    rng = random.Random(0)
    for _ in range(200):
        tokens, batch = rng.randrange(1, 400), rng.randrange(1, 16)
        context = batch * rng.uniform(50, 1000)
        model.observe(StepShape(tokens, prompt_shape(tokens).prefill_context), 0.01 + 5e-4 * tokens)
        model.observe(
            StepShape(decode_batch=batch, decode_context=context), 0.01 + 1e-3 * batch + 5e-6 * context
        )
    return model


MODEL = step_times()


def worker(name: str, role: str, *, layout: str = "L", max_running: int = 16, **load: int) -> WorkerHandle:
    handle = WorkerHandle(Member(worker_id=name, role=role, address=f"{name}:1", incarnation="1"), MODEL)
    chunk = {"prefill": 512, "decode": 128, "colocated": 128}[role]
    handle.on_hello(
        wpb.WorkerHello(
            worker_id=name,
            incarnation="1",
            role=role,
            block_size=16,
            layout_hash=layout,
            max_running=max_running,
            chunk_budget=chunk,
        )
    )
    handle.load = wpb.Load(blocks_total=1000, blocks_free=1000)
    for field, value in load.items():
        setattr(handle.load, field, value)
    handle.clock.observe(0.0, 0.0, 0.0)
    handle.state = WorkerState.READY
    return handle


def demand(tokens: Sequence[int] = PROMPT, new: int = 64, slo: Slo | None = None) -> Demand:
    return Demand(
        num_tokens=len(tokens),
        max_new_tokens=new,
        slo=slo or Slo(),
        elapsed_s=0.0,
        block_hashes=PromptHashes(tokens, {}),
    )


def names(placement: Placement) -> tuple[str, str]:
    """Prefill and decode worker; no prefill worker is "-"."""
    return placement.prefill.worker_id if placement.prefill else "-", placement.decode.worker_id
