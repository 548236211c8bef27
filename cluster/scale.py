"""`diphase scale` and `diphase restart`: what is asked of the supervisor by way of a gateway, and how it
goes."""

from __future__ import annotations

import argparse
import asyncio
import math

import grpc.aio
from rich.console import Console

from ..proto import cluster_pb2 as pb
from ..proto.cluster_pb2_grpc import ClusterStub
from ..proto.errors import ConfigError, DiphaseError, WorkerLost
from .endpoint import credentials, from_rpc, open_channel

ANSWER_S = 30.0
"""Beyond the deadline of the change, for what it ends then."""


def add_scale_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `diphase scale`."""
    parser.add_argument("pool", metavar="POOL", help="prefill, decode or colocated")
    parser.add_argument("workers", metavar="N", type=int, help="workers it is to have")
    _add_common(parser)


def add_restart_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `diphase restart`."""
    parser.add_argument(
        "pool", metavar="POOL", nargs="?", default="", help="prefill, decode or colocated (default: all)"
    )
    parser.add_argument(
        "--with",
        action="append",
        default=[],
        metavar="K=V",
        dest="changed",
        help="section.key=value of engine, host, kv_transfer or a pool, for the new workers",
    )
    _add_common(parser)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--address", metavar="HOST:PORT", help="of a gateway (default: as configured)")
    parser.add_argument(
        "--timeout-s", type=float, default=0.0, metavar="S", help="deadline (default: the cluster's)"
    )


def run_scale(args: argparse.Namespace, address: str, token: str) -> int:
    """Runs `diphase scale`; the exit status."""
    if not 0 <= args.workers < 2**31:
        raise ConfigError(f"N = {args.workers} is no number of workers; use 0 or more")
    return _run(pb.ChangeRequest(scale=pb.Scale(pool=args.pool, workers=args.workers)), args, address, token)


def run_restart(args: argparse.Namespace, address: str, token: str) -> int:
    """Runs `diphase restart`; the exit status."""
    restart = pb.Restart(pool=args.pool, settings=args.changed)
    return _run(pb.ChangeRequest(restart=restart), args, address, token)


def _run(request: pb.ChangeRequest, args: argparse.Namespace, address: str, token: str) -> int:
    if not 0.0 <= args.timeout_s < math.inf:
        raise ConfigError(f"--timeout-s {args.timeout_s:g} is no time; use 0 or more")
    request.timeout_s = args.timeout_s
    asyncio.run(follow(request, address, token, Console(highlight=False)))
    return 0


async def follow(request: pb.ChangeRequest, address: str, token: str, console: Console) -> None:
    """Asks for the change and prints a line for each step; returns when it is complete.

    Raises:
        DiphaseError: it cannot be made, was not complete in time, or nobody answers.
    """
    deadline_s = request.timeout_s + ANSWER_S if request.timeout_s else None
    async with open_channel(address) as channel:
        call = ClusterStub(channel).Change(request, timeout=deadline_s, metadata=credentials(token))
        try:
            async for progress in call:
                who = f"{progress.worker_id}: " if progress.worker_id else ""
                console.print(f"{who}{progress.step}", markup=False)
        except grpc.aio.AioRpcError as exc:
            raise _error(exc, address) from exc


def _error(exc: grpc.aio.AioRpcError, address: str) -> DiphaseError:
    if exc.code() in (grpc.StatusCode.ABORTED, grpc.StatusCode.DEADLINE_EXCEEDED):
        return WorkerLost(exc.details() or "the change was not complete in time")
    if exc.code() is grpc.StatusCode.INVALID_ARGUMENT:
        return ConfigError(exc.details() or "the change cannot be made")
    return from_rpc(exc, address)
