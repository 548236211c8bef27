"""`diphase status`: one gateway's view of the cluster, as a table, a live table or JSON."""

from __future__ import annotations

import argparse
import asyncio
import sys

from google.protobuf.json_format import MessageToJson
from rich.console import Console
from rich.live import Live
from rich.table import Table

from ..proto.errors import WorkerLost
from .endpoint import CONNECT_S, StatusClient
from .terminal import status_table


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
            status = await client.ask(address, CONNECT_S)
            sys.stdout.write(MessageToJson(status, preserving_proto_field_name=True) + "\n")
        elif not args.watch:
            Console().print(await _table(client, address))
        else:
            with Live(await _table(client, address), auto_refresh=False) as live:
                while True:
                    await asyncio.sleep(max(args.every_s, 0.05))
                    live.update(await _table(client, address), refresh=True)
    finally:
        await client.close()


async def _table(client: StatusClient, address: str) -> Table:
    status = await client.ask(address, CONNECT_S)
    return status_table(status, await client.not_ready(address, CONNECT_S))
