"""`diphase generate`: one prompt to a gateway, its text to the terminal as it comes."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable

import grpc
import grpc.aio
from rich.console import Console

from ..proto import inference_pb2 as pb
from ..proto.errors import DiphaseError, InvalidRequest
from ..proto.inference_pb2_grpc import InferenceStub
from ..proto.sampling import SamplingParams
from .endpoint import credentials, from_rpc, open_channel
from .terminal import stages_table

Write = Callable[[str], None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `diphase generate`."""
    parser.add_argument(
        "prompt", help="the text to go on from, or with --chat the user's message; - reads it from stdin"
    )
    parser.add_argument("--chat", action="store_true", help="wrap the prompt in the model's chat template")
    parser.add_argument("--system", metavar="TEXT", help="with --chat: the system message")
    parser.add_argument("--address", metavar="HOST:PORT", help="of a gateway (default: as configured)")
    parser.add_argument("--max-tokens", type=int, metavar="N")
    parser.add_argument("--temperature", type=float, metavar="T", help="0, the default, is greedy")
    parser.add_argument("--top-p", type=float, metavar="P")
    parser.add_argument("--top-k", type=int, metavar="K")
    parser.add_argument("--seed", type=int, metavar="N")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="may be repeated")
    parser.add_argument(
        "--request-id", default="", metavar="ID", help="for `diphase trace` (default: drawn by the gateway)"
    )
    parser.add_argument(
        "--stages", action="store_true", help="print the request's id and where the time went, to stderr"
    )


def request_from(args: argparse.Namespace) -> pb.GenerateRequest:
    """The request that the options describe.

    Raises:
        InvalidRequest: a number that no request can carry (the gateway judges the others), or a prompt on
            stdin that is not UTF-8.
    """
    prompt = _stdin() if args.prompt == "-" else args.prompt
    sampling = pb.Sampling(stop=args.stop)
    for name in ("max_tokens", "temperature", "top_p", "top_k", "seed"):
        if (value := getattr(args, name)) is not None:
            try:
                setattr(sampling, name, value)
            except ValueError as exc:
                SamplingParams(**{name: value})  # says which values are in range
                raise InvalidRequest(f"sampling.{name} = {value} is out of range: {exc}") from exc
    request = pb.GenerateRequest(request_id=args.request_id, sampling=sampling)
    if args.chat:
        messages = [pb.ChatMessage(role="system", content=args.system)] if args.system else []
        messages.append(pb.ChatMessage(role="user", content=prompt))
        request.chat.CopyFrom(pb.Chat(messages=messages))
    else:
        request.prompt = prompt
    return request


def _stdin() -> str:
    """All of stdin but the newline that ends it, which editors and `echo` add."""
    try:
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as exc:
        raise InvalidRequest(f"the prompt on stdin is not UTF-8: {exc}") from exc


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
    """Runs the command; the exit status.

    Raises:
        DiphaseError: as request_from() and stream(); text that came before stands on lines of its own.
    """
    request = request_from(args)
    begun = False

    def write(text: str) -> None:
        nonlocal begun
        begun = begun or bool(text)
        sys.stdout.write(text)
        sys.stdout.flush()

    try:
        last = asyncio.run(print_stream(stream(address, token, request), write))
    except KeyboardInterrupt:
        write("\n")
        return 130
    except DiphaseError:
        if begun:
            write("\n")
        raise
    write("\n")
    if args.stages:
        Console(stderr=True, highlight=False).print(stages_table([last]))
    return 0
