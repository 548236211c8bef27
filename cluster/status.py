"""`diphase status`: one gateway's view of the cluster, as a table, a live table or JSON."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Callable

from google.protobuf.json_format import MessageToJson
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from ..proto import cluster_pb2
from ..proto.errors import DiphaseError, WorkerLost
from .endpoint import CONNECT_S, WILDCARDS, StatusClient
from .terminal import status_table, transfers_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `diphase status`."""
    parser.add_argument("--address", metavar="HOST:PORT", help="of a gateway (default: as configured)")
    parser.add_argument("--json", action="store_true", help="print the status message as JSON")
    parser.add_argument("--watch", action="store_true", help="refresh until Ctrl-C")
    parser.add_argument("--every-s", type=float, default=0.5, metavar="S", help="with --watch (%(default)s)")


def run(args: argparse.Namespace, address: str, token: str) -> int:
    """Runs the command; the exit status."""
    try:
        asyncio.run(_show(args, address, token))
    except TimeoutError as exc:
        raise WorkerLost(str(exc)) from exc
    except KeyboardInterrupt:
        return 0
    return 0


async def _show(args: argparse.Namespace, address: str, token: str) -> None:
    client = StatusClient(token)
    try:
        if args.json:
            status = await ask(client, address)
            sys.stdout.write(MessageToJson(status, preserving_proto_field_name=True) + "\n")
        elif not args.watch:
            Console().print(await _table(client, address))
        else:
            with Live(auto_refresh=False) as live:
                await watch(
                    client, address, max(args.every_s, 0.05), lambda view: live.update(view, refresh=True)
                )
    finally:
        await client.close()


async def watch(
    client: StatusClient, address: str, every_s: float, show: Callable[[RenderableType], None]
) -> None:
    """Shows a new table every `every_s` seconds until cancelled. While the gateway does not answer, the last
    one stays, with a sentence below that says so.

    Raises:
        TimeoutError, DiphaseError: it does not answer the first time.
    """
    table = await _table(client, address)
    show(table)
    while True:
        await asyncio.sleep(every_s)
        try:
            table = await _table(client, address)
        except (TimeoutError, DiphaseError) as exc:
            show(Group(table, Text(f"{exc}\nThe table is the last known; still trying.", style="red")))
        else:
            show(table)


async def ask(client: StatusClient, address: str) -> cluster_pb2.GetStatusResponse:
    """The view of the gateway at `address`. Its metrics are where the gateway is: one that listens on every
    interface knows no address of its own.

    Raises:
        TimeoutError, DiphaseError: as StatusClient.ask().
    """
    status = await client.ask(address, CONNECT_S, transfers=True)
    host, _colon, port = status.metrics_address.rpartition(":")
    if host.strip("[]") in WILDCARDS:
        status.metrics_address = f"{address.rpartition(':')[0]}:{port}"
    return status


async def _table(client: StatusClient, address: str) -> RenderableType:
    status = await ask(client, address)
    workers = status_table(status, await client.not_ready(address, CONNECT_S))
    transfers = transfers_table(status)
    return workers if transfers is None else Group(workers, Text(), transfers)
