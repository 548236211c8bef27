"""The gRPC services that clients reach. Each call is parsed, handed on, and its outcome mapped to a status.

Requests arrive as bytes and are parsed here, so that what is malformed gets a status and a sentence of ours.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import Awaitable, Callable
from typing import NoReturn, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message

from ..proto import cluster_pb2
from ..proto import inference_pb2 as pb
from ..proto.clock import Clock
from ..proto.errors import (
    Cancelled,
    DiphaseError,
    InternalError,
    InvalidRequest,
    NotFound,
    Unauthenticated,
)
from ..proto.slo import slo_to_proto
from .compatibility import mismatches
from .dispatcher import Dispatcher
from .generation import Generation
from .supervisor_link import SupervisorLink
from .text import TextProcessor
from .traces import MAX_REQUESTS, RecentRequests, time_line
from .worker_handle import WorkerState
from .workers import WorkerPool

logger = logging.getLogger(__name__)

INFERENCE = "diphase.v1.Inference"
CLUSTER = "diphase.v1.Cluster"
RETRY_AFTER = "retry-after-ms"
"""Trailing metadata: when a retry makes sense, milliseconds."""

Context = grpc.aio.ServicerContext[bytes, Message]
Request = TypeVar("Request", bound=Message)


class GatewayServices:
    """Inference and Cluster of one gateway."""

    def __init__(
        self,
        *,
        dispatcher: Dispatcher,
        pool: WorkerPool,
        text: TextProcessor,
        clock: Clock,
        client_stall_s: float,
        client_token: str,
        supervisor: SupervisorLink,
    ) -> None:
        """`client_token`: what every call must bring as `authorization: Bearer …`; empty asks for nothing."""
        self.metrics_address = ""
        """host:port of the gateway's /metrics, which GetStatus tells; known once that listens."""
        self._dispatcher = dispatcher
        self._pool = pool
        self._text = text
        self._clock = clock
        self._client_stall_s = client_stall_s
        self._recent = RecentRequests()
        self._supervisor = supervisor
        self._writing: dict[asyncio.Task[None], float] = {}
        self._bearer = f"Bearer {client_token}" if client_token else ""

    def add_to(self, server: grpc.aio.Server) -> None:
        unary, stream = grpc.unary_unary_rpc_method_handler, grpc.unary_stream_rpc_method_handler
        server.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler(
                    INFERENCE,
                    {
                        "Generate": stream(
                            self._generate, response_serializer=pb.GenerateResponse.SerializeToString
                        ),
                        "GetModel": unary(
                            self._answer(pb.GetModelRequest, self._get_model),
                            response_serializer=pb.GetModelResponse.SerializeToString,
                        ),
                        "Health": unary(
                            self._answer(pb.HealthRequest, self._health),
                            response_serializer=pb.HealthResponse.SerializeToString,
                        ),
                    },
                ),
                grpc.method_handlers_generic_handler(
                    CLUSTER,
                    {
                        "GetStatus": unary(
                            self._answer(cluster_pb2.GetStatusRequest, self._get_status),
                            response_serializer=cluster_pb2.GetStatusResponse.SerializeToString,
                        ),
                        "GetTrace": unary(
                            self._answer(cluster_pb2.GetTraceRequest, self._get_trace),
                            response_serializer=cluster_pb2.GetTraceResponse.SerializeToString,
                        ),
                        "Change": stream(
                            self._change, response_serializer=cluster_pb2.ChangeProgress.SerializeToString
                        ),
                    },
                ),
            )
        )

    @property
    def ready(self) -> bool:
        """Whether a placement is possible: every worker but a prefill one can serve a request alone."""
        return any(worker.role != "prefill" for worker in self._pool.ready())

    # Generate

    async def _generate(self, data: bytes, context: Context) -> None:
        received_at = self._clock.now()
        try:
            self._authenticate(context)
            self._text.check_size(len(data))
            await self._serve(_parse(pb.GenerateRequest, data), context, received_at)
        except DiphaseError as exc:
            await _abort(context, exc)
        except Exception as exc:
            logger.exception("generate_failed")
            await _abort(
                context, InternalError(f"the gateway failed: {type(exc).__name__}; its log says where")
            )

    async def _serve(self, message: pb.GenerateRequest, context: Context, received_at: float) -> None:
        generation = await self._begin(message, received_at)
        try:
            while not generation.finished:
                response = await generation.next()
                await self._write(context, response)
            generation.delivered()
        finally:
            generation.close()

    async def _begin(self, message: pb.GenerateRequest, received_at: float) -> Generation:
        if not message.HasField("resume_from"):
            request = await self._text.prepare(message, received_at)
            stream = self._dispatcher.accept(request)
            self._recent.add(stream.active)
            return Generation(self._dispatcher, stream, self._text.stream(request.sampling), self._clock)
        stream = await self._dispatcher.resume(self._text.check_resume(message))
        self._recent.add(stream.active)
        text = self._text.stream(stream.active.request.sampling)
        return Generation(self._dispatcher, stream, text, self._clock, message.resume_from)

    async def _write(self, context: Context, response: pb.GenerateResponse) -> None:
        """Writes a message; end_stalled() puts a limit to it, since a timer of its own would cost each
        message more than all the rest."""
        task = asyncio.current_task()
        assert task is not None
        self._writing[task] = self._clock.now()
        try:
            await context.write(response)
        except asyncio.CancelledError:
            if task not in self._writing:
                raise Cancelled(f"the client has read nothing for {self._client_stall_s:g} s") from None
            raise
        finally:
            self._writing.pop(task, None)

    def end_stalled(self) -> None:
        """Ends calls whose client has read nothing for too long; to be called now and then."""
        before = self._clock.now() - self._client_stall_s
        for task in [task for task, since in self._writing.items() if since < before]:
            del self._writing[task]
            task.cancel()

    # Change

    async def _change(self, data: bytes, context: Context) -> None:
        try:
            self._authenticate(context)
            request = _parse(cluster_pb2.ChangeRequest, data)
            async for progress in self._supervisor.change(request):
                await context.write(progress)
        except DiphaseError as exc:
            await _abort(context, exc)
        except grpc.aio.AioRpcError as exc:
            await context.abort(exc.code(), exc.details() or "")

    # the others

    def _answer(
        self, request_type: type[Request], answer: Callable[[Request], Awaitable[Message]]
    ) -> Callable[[bytes, Context], Awaitable[Message]]:
        """A unary method: parse, answer, map errors."""

        async def method(data: bytes, context: Context) -> Message:
            try:
                self._authenticate(context)
                return await answer(_parse(request_type, data))
            except DiphaseError as exc:
                await _abort(context, exc)

        return method

    async def _get_model(self, _: pb.GetModelRequest) -> pb.GetModelResponse:
        model = self._text.model
        workers = self._pool.ready()
        return pb.GetModelResponse(
            model=model.name,
            context_length=model.context_length,
            vocab_size=model.vocab_size,
            block_size=workers[0].block_size if workers else 0,
            has_chat_template=model.chat_template.available,
            default_slo=slo_to_proto(self._text.default_slo),
        )

    async def _health(self, _: pb.HealthRequest) -> pb.HealthResponse:
        """Also when it is ready, the detail names the workers that are not."""
        states = ", ".join(
            f"{worker.worker_id} is {worker.state}" + (f" ({worker.detail})" if worker.detail else "")
            for worker in self._pool.handles()
            if worker.state is not WorkerState.READY
        )
        if self.ready:
            return pb.HealthResponse(ready=True, detail=states)
        return pb.HealthResponse(detail=f"no worker that decodes is ready: {states or 'none is known'}")

    async def _get_status(self, request: cluster_pb2.GetStatusRequest) -> cluster_pb2.GetStatusResponse:
        asked = [worker for worker in self._pool.handles() if worker.usable and request.transfers]
        answers = await self._pool.inspector.ask(asked)
        dispatcher, now = self._dispatcher, self._clock.now()
        admission = dispatcher.admission
        return cluster_pb2.GetStatusResponse(
            model=self._text.model.name,
            gateway_id=dispatcher.gateway_id,
            metrics_address=self.metrics_address,
            workers=[
                cluster_pb2.WorkerStatus(
                    worker_id=worker.worker_id,
                    role=worker.role,
                    state=worker.state.value,
                    address=worker.member.address,
                    incarnation=worker.incarnation,
                    load=worker.load,
                    heartbeat_age_s=max(0.0, now - worker.last_frame_at) if worker.attached else 0.0,
                    metrics_address=worker.member.metrics_address,
                    transfers=answers[worker.worker_id].transfers if worker.worker_id in answers else (),
                    layout_hash=worker.layout_hash,
                    protocol_version=worker.protocol_version,
                    kv_sharding=worker.kv_sharding,
                    package_version=worker.package_version,
                    step_error=worker.drift.error,
                    step_bias=worker.drift.bias,
                    predicted_steps=worker.drift.num_steps,
                )
                for worker in self._pool.handles()
            ],
            mismatches=[
                cluster_pb2.Mismatch(prefill=pair.prefill, decode=pair.decode, reason=pair.reason)
                for pair in mismatches(self._pool.handles())
            ],
            queued_requests=admission.queued_requests,
            running_requests=dispatcher.open_requests - admission.queued_requests,
            queued_tokens=admission.queued_tokens,
            requests_by_slo=dispatcher.metrics.requests_by_slo,
        )

    async def _get_trace(self, request: cluster_pb2.GetTraceRequest) -> cluster_pb2.GetTraceResponse:
        found = self._recent.find(request.request_id)
        if found is None:
            raise NotFound(
                f"this gateway knows no request {request.request_id!r}; it remembers the last {MAX_REQUESTS} "
                "that it served"
            )
        request_id, times = found
        workers = [worker for worker in self._pool.handles() if worker.usable and worker.clock.known]
        answers = await self._pool.inspector.ask(workers, request_id)
        clocks = {worker.worker_id: worker.clock for worker in workers}
        trace = time_line(request_id, times, self._dispatcher.gateway_id, answers, clocks)
        trace.silent.extend(worker_id for worker_id in clocks if worker_id not in answers)
        return trace

    def _authenticate(self, context: Context) -> None:
        if not self._bearer:
            return
        for key, value in context.invocation_metadata() or ():
            if key == "authorization" and hmac.compare_digest(str(value).encode(), self._bearer.encode()):
                return
        raise Unauthenticated("send the cluster's token as metadata `authorization: Bearer <token>`")


def _parse(request_type: type[Request], data: bytes) -> Request:
    try:
        return request_type.FromString(data)
    except DecodeError as exc:
        raise InvalidRequest(
            f"the request is no valid {request_type.DESCRIPTOR.name}; text must be UTF-8 ({exc})"
        ) from exc


async def _abort(context: Context, error: DiphaseError) -> NoReturn:
    """Ends the call with the error's status; always raises."""
    trailing: tuple[tuple[str, str], ...] = ()
    if error.retry_after_s is not None:
        trailing = ((RETRY_AFTER, str(round(error.retry_after_s * 1000.0))),)
    await context.abort(grpc.StatusCode[error.grpc_status], error.message, trailing)
    raise AssertionError("abort() raises")
