"""`diphase trace REQUEST_ID`: one request's way through gateway and workers on one time line, as text or as a
Chrome trace (Perfetto and chrome://tracing open it)."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..proto.cluster_pb2 import GetTraceResponse
from ..proto.errors import ConfigError, NotFound, WorkerLost
from .endpoint import CONNECT_S, StatusClient

_MICROSECONDS = 1e6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `diphase trace`."""
    parser.add_argument(
        "request_id",
        metavar="REQUEST_ID",
        help="as `diphase generate --stages` prints it, or --request-id sets it; or the gateway's own",
    )
    parser.add_argument(
        "--address", metavar="HOST:PORT", help="of the gateway that served it (default: as configured)"
    )
    parser.add_argument("--chrome", type=Path, metavar="FILE", help="write a Chrome trace; - is stdout")


def run(args: argparse.Namespace, address: str, token: str) -> int:
    """Runs the command; the exit status."""
    try:
        trace = asyncio.run(_ask(args.request_id, address, token))
    except TimeoutError as exc:
        raise WorkerLost(str(exc)) from exc
    except NotFound as exc:
        raise NotFound(
            f"{exc.message}. `diphase generate --stages` prints a request's id, its --request-id sets it, "
            "and every response of the API has it"
        ) from exc
    if args.chrome is None:
        sys.stdout.write("\n".join(text_lines(trace)) + "\n")
        return 0
    content = json.dumps(chrome_trace(trace)) + "\n"
    if str(args.chrome) == "-":
        sys.stdout.write(content)
        return 0
    try:
        args.chrome.write_text(content)
    except OSError as exc:
        raise ConfigError(f"the trace cannot be written: {exc}") from exc
    return 0


async def _ask(request_id: str, address: str, token: str) -> GetTraceResponse:
    client = StatusClient(token)
    try:
        return await client.trace(address, request_id, CONNECT_S)
    finally:
        await client.close()


def text_lines(trace: GetTraceResponse) -> Iterator[str]:
    """One event a line, in order of their beginning."""
    yield f"request {trace.request_id}, milliseconds since the gateway received it"
    yield f"{'begin':>10} {'took':>9}  {'where':<12} what"
    for event in trace.events:
        took = f"{(event.end_s - event.begin_s) * 1e3:9.3f}" if event.end_s > event.begin_s else " " * 9
        what = f"{event.track}: {event.name}"
        line = f"{event.begin_s * 1e3:10.3f} {took}  {event.where:<12} {what}  {event.detail}"
        yield line.rstrip()
    for worker_id in trace.silent:
        yield f"{worker_id} did not answer in time: its part is missing"


def chrome_trace(trace: GetTraceResponse) -> dict[str, Any]:
    """The Trace Event Format's JSON object: a process for each gateway and worker, a thread for each
    track."""
    processes: dict[str, int] = {}
    threads: dict[tuple[str, str], int] = {}
    events: list[dict[str, Any]] = []
    for event in trace.events:
        place = (event.where, event.track)
        if event.where not in processes:
            processes[event.where] = len(processes) + 1
            events.append(_named("process_name", processes[event.where], 0, event.where))
        if place not in threads:
            threads[place] = len(threads) + 1
            events.append(_named("thread_name", processes[event.where], threads[place], event.track))
        shown: dict[str, Any] = {
            "name": event.name,
            "cat": event.track,
            "pid": processes[event.where],
            "tid": threads[place],
            "ts": event.begin_s * _MICROSECONDS,
            "args": {"detail": event.detail},
        }
        if event.end_s > event.begin_s:
            events.append({**shown, "ph": "X", "dur": (event.end_s - event.begin_s) * _MICROSECONDS})
        else:
            events.append({**shown, "ph": "i", "s": "t"})
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {"request_id": trace.request_id, "silent": list(trace.silent)},
    }


def _named(kind: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": pid, "tid": tid, "args": {"name": name}}
