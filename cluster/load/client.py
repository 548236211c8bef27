"""The open-loop client: sends what a plan says when it says so, and stamps every token that comes back.

Open loop means that nobody waits for anybody: arrival times are fixed before the run and a slow cluster
faces the same arrivals as a fast one. TTFT runs from the time at which the request was *due*, so that a
client that falls behind never flatters the server; how late it sent is measured beside it. It judges nothing
(report.py does)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

import grpc
import grpc.aio

from ...proto import inference_pb2 as pb
from ...proto.errors import ConfigError, DiphaseError, InternalError
from ...proto.inference_pb2_grpc import InferenceStub
from ...proto.slo import Slo, tpot_ms
from ..endpoint import credentials
from .workload import PlannedRequest

LEAD_S = 0.05
"""From the call to the first planned arrival, so that the first request is not late by construction."""

_CONNECT_S = 10.0


class Timer(Protocol):
    """Seconds on a monotonic clock, and waiting on it."""

    def now(self) -> float: ...
    async def sleep_until(self, at: float) -> None: ...


class LoopTimer:
    """The live timer."""

    def now(self) -> float:
        return time.monotonic()

    async def sleep_until(self, at: float) -> None:
        """Returns at `at` or as soon after it as the event loop can; always lets other tasks run."""
        await asyncio.sleep(max(0.0, at - time.monotonic()))


class Outcome(StrEnum):
    """How a request ended for the client."""

    FINISHED = "finished"
    REJECTED = "rejected"
    TIMED_OUT = "timed_out"
    FAILED = "failed"


@dataclass(slots=True, kw_only=True)
class RequestResult:
    """What the client saw of one request. Times are seconds since the start of the run."""

    index: int
    due_s: float
    sent_s: float = 0.0
    token_s: list[float] = field(default_factory=list)
    """When each token came; tokens of one message share a time."""
    outcome: Outcome = Outcome.FAILED
    detail: str = ""
    """Why it did not finish."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    stages: dict[str, float] = field(default_factory=dict)
    """The server's own account of the latency (proto Stages), milliseconds by name."""
    workers: tuple[str, str] = ("", "")
    """Prefill and decode worker."""
    handoff_bytes: int = 0
    """KV moved between them; 0 where one worker did both phases."""
    server_verdict: str = ""

    @property
    def lateness_ms(self) -> float:
        """Due to sent: the client's own fault."""
        return (self.sent_s - self.due_s) * 1000.0

    @property
    def ttft_ms(self) -> float | None:
        """Due to first token."""
        return (self.token_s[0] - self.due_s) * 1000.0 if self.token_s else None

    @property
    def tpot_ms(self) -> float | None:
        if not self.token_s:
            return None
        return tpot_ms(self.token_s[0], self.token_s[-1], len(self.token_s))

    @property
    def itl_ms(self) -> list[float]:
        """Gaps between neighbouring tokens."""
        return [(b - a) * 1000.0 for a, b in zip(self.token_s, self.token_s[1:], strict=False)]

    @property
    def last_s(self) -> float:
        """When the last token came; when it was sent, if none did."""
        return self.token_s[-1] if self.token_s else self.sent_s

    def take(self, response: pb.GenerateResponse, at_s: float) -> None:
        """Notes one message of the stream.

        Raises:
            InternalError: tokens are missing, repeated or miscounted.
        """
        if response.token_ids and response.index != len(self.token_s):
            raise InternalError(f"token {response.index} came where {len(self.token_s)} was next")
        self.token_s.extend([at_s] * len(response.token_ids))
        if response.finish_reason == pb.FINISH_REASON_UNSPECIFIED:
            return
        if response.usage.completion_tokens != len(self.token_s):
            raise InternalError(
                f"{len(self.token_s)} tokens came and {response.usage.completion_tokens} were counted"
            )
        self.outcome = Outcome.FINISHED
        self.prompt_tokens = response.usage.prompt_tokens
        self.cached_tokens = response.usage.cached_tokens
        self.stages = _stage_times(response.stages)
        self.handoff_bytes = response.stages.handoff_bytes
        self.workers = (response.stages.prefill_worker, response.stages.decode_worker)
        self.server_verdict = response.slo


def _stage_times(stages: pb.Stages) -> dict[str, float]:
    """Every time the server measured; those that this request did not have are left out."""
    return {
        descriptor.name: getattr(stages, descriptor.name)
        for descriptor in stages.DESCRIPTOR.fields
        if descriptor.name.endswith("_ms")
        and (not descriptor.has_presence or stages.HasField(descriptor.name))
    }


async def fetch_model(stub: InferenceStub, address: str, token: str = "") -> pb.GetModelResponse:
    """What the cluster serves.

    Raises:
        ConfigError: no gateway answers at `address`, or it wants another token.
    """
    try:
        response: pb.GetModelResponse = await stub.GetModel(
            pb.GetModelRequest(), timeout=_CONNECT_S, wait_for_ready=True, metadata=credentials(token)
        )
    except grpc.aio.AioRpcError as exc:
        raise ConfigError(
            f"no gateway answers at {address} ({exc.code().name}: {exc.details()}); start one with "
            "`diphase serve` or name its address with --address"
        ) from exc
    return response


def to_request(planned: PlannedRequest, slo: Slo) -> pb.GenerateRequest:
    """Greedy, and exactly as many tokens as planned: eos does not end it."""
    request = pb.GenerateRequest(
        sampling=pb.Sampling(max_tokens=planned.output_tokens, temperature=0.0, ignore_eos=True),
        slo=pb.Slo(ttft_ms=slo.ttft_ms, tpot_ms=slo.tpot_ms),
    )
    if isinstance(planned.prompt, str):
        request.prompt = planned.prompt
    else:
        request.token_ids.ids.extend(planned.prompt)
    return request


class LoadClient:
    """Sends plans to one gateway."""

    def __init__(
        self,
        stub: InferenceStub,
        *,
        slo: Slo,
        timeout_s: float,
        timer: Timer,
        token: str = "",
        on_done: Callable[[RequestResult], None] | None = None,
    ) -> None:
        """`timeout_s`: longest life of one request, from sending; `token`: the cluster's, for gateways beyond
        loopback; `on_done` hears of each request's end."""
        self._stub = stub
        self._slo = slo
        self._timeout_s = timeout_s
        self._timer = timer
        self._metadata = credentials(token)
        self._on_done = on_done

    async def run_open_loop(self, plan: Sequence[PlannedRequest]) -> list[RequestResult]:
        """Every request at its time, whatever became of the others. Cancelled, it cancels all that run."""
        # Messages are built beforehand: sending must cost as little as it can.
        messages = [to_request(planned, self._slo) for planned in plan]
        results = [RequestResult(index=planned.index, due_s=planned.arrival_s) for planned in plan]
        start = self._timer.now() + LEAD_S
        async with asyncio.TaskGroup() as group:
            for message, result in zip(messages, results, strict=True):
                await self._timer.sleep_until(start + result.due_s)
                group.create_task(self._run_one(message, result, start))
        return results

    async def run_one_by_one(self, plan: Sequence[PlannedRequest]) -> list[RequestResult]:
        """Each request when its predecessor has ended: the latency of an idle cluster. Arrival times of the
        plan are not used; a request is due when it is sent."""
        start = self._timer.now()
        results: list[RequestResult] = []
        for planned in plan:
            result = RequestResult(index=planned.index, due_s=self._timer.now() - start)
            await self._run_one(to_request(planned, self._slo), result, start)
            results.append(result)
        return results

    async def _run_one(self, request: pb.GenerateRequest, result: RequestResult, start: float) -> None:
        result.sent_s = self._timer.now() - start
        call = self._stub.Generate(request, timeout=self._timeout_s, metadata=self._metadata)
        try:
            async for response in call:
                result.take(response, self._timer.now() - start)
            if result.outcome is not Outcome.FINISHED:
                result.detail = "the stream ended without a finish reason"
        except grpc.aio.AioRpcError as exc:
            result.outcome = _OUTCOMES.get(exc.code(), Outcome.FAILED)
            result.detail = f"{exc.code().name}: {exc.details()}"
        except DiphaseError as exc:
            result.outcome, result.detail = Outcome.FAILED, exc.message
        finally:
            # Frees the server's side when this task is cancelled; does nothing once the call has ended.
            call.cancel()
        if self._on_done is not None:
            self._on_done(result)


_OUTCOMES = {
    grpc.StatusCode.RESOURCE_EXHAUSTED: Outcome.REJECTED,
    grpc.StatusCode.DEADLINE_EXCEEDED: Outcome.TIMED_OUT,
}
