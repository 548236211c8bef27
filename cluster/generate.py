"""`diphase generate`: one prompt to a gateway, its text to the terminal as it comes."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable

import grpc
import grpc.aio

from ..proto import inference_pb2 as pb
from ..proto.errors import InvalidRequest
from ..proto.inference_pb2_grpc import InferenceStub
from .endpoint import credentials, from_rpc, open_channel

Write = Callable[[str], None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `diphase generate`."""
    parser.add_argument("prompt", help="the text to go on from, or with --chat the user's message")
    parser.add_argument("--chat", action="store_true", help="wrap the prompt in the model's chat template")
    parser.add_argument("--system", metavar="TEXT", help="with --chat: the system message")
    parser.add_argument("--address", metavar="HOST:PORT", help="of a gateway (default: as configured)")
    parser.add_argument("--max-tokens", type=int, metavar="N")
    parser.add_argument("--temperature", type=float, metavar="T", help="0, the default, is greedy")
    parser.add_argument("--top-p", type=float, metavar="P")
    parser.add_argument("--top-k", type=int, metavar="K")
    parser.add_argument("--seed", type=int, metavar="N")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="may be repeated")
    parser.add_argument("--stages", action="store_true", help="print where the time went, to stderr")


def request_from(args: argparse.Namespace) -> pb.GenerateRequest:
    """The request that the options describe.

    Raises:
        InvalidRequest: a number that no request can carry; the gateway judges the others.
    """
    sampling = pb.Sampling(stop=args.stop)
    for name in ("max_tokens", "temperature", "top_p", "top_k", "seed"):
        if (value := getattr(args, name)) is not None:
            try:
                setattr(sampling, name, value)
            except ValueError as exc:
                raise InvalidRequest(f"{name} = {value} is out of range: {exc}") from exc
    request = pb.GenerateRequest(sampling=sampling)
    if args.chat:
        messages = [pb.ChatMessage(role="system", content=args.system)] if args.system else []
        messages.append(pb.ChatMessage(role="user", content=args.prompt))
        request.chat.CopyFrom(pb.Chat(messages=messages))
    else:
        request.prompt = args.prompt
    return request


async def stream(
    address: str, token: str, request: pb.GenerateRequest
) -> AsyncGenerator[pb.GenerateResponse, None]:
    """The responses to `request`. Leaving the iteration, or being cancelled, cancels the request.

    Raises:
        DiphaseError: the gateway refused or failed it.
    """
    async with open_channel(address) as channel:
        call = InferenceStub(channel).Generate(request, metadata=credentials(token))
        try:
            async for response in call:
                yield response
        except grpc.aio.AioRpcError as exc:
            raise from_rpc(exc, address) from exc
        finally:
            call.cancel()


async def print_stream(responses: AsyncIterator[pb.GenerateResponse], write: Write) -> pb.GenerateResponse:
    """Writes the text as it comes and returns the last response."""
    last = pb.GenerateResponse()
    async for response in responses:
        write(response.text)
        last = response
    return last


def run(args: argparse.Namespace, address: str, token: str) -> int:
    """Runs the command; the exit status."""

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    try:
        last = asyncio.run(print_stream(stream(address, token, request_from(args)), write))
    except KeyboardInterrupt:
        write("\n")
        return 130
    write("\n")
    if args.stages:
        sys.stderr.write(str(last.stages))
    return 0
