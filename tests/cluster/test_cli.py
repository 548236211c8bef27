from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import AsyncIterator
from importlib.metadata import version
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from diphase.cluster import generate
from diphase.cluster.cli import COMMANDS, main
from diphase.cluster.endpoint import StatusClient, credentials, from_rpc
from diphase.kv_transfer.codecs.codec import CODECS, RAW
from diphase.kv_transfer.config import TRANSPORT_CHOICES
from diphase.proto import inference_pb2 as pb
from diphase.proto.errors import (
    ConfigError,
    DiphaseError,
    InvalidRequest,
    NotFound,
    Overloaded,
    WorkerLost,
)
from diphase.proto.inference_pb2_grpc import InferenceServicer, add_InferenceServicer_to_server
from diphase.proto.sampling import SamplingParams

# What gRPC's core will find, told at the moment when it is imported.
VERBOSITY = """
import os, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "grpc":
            print(os.environ.get("GRPC_VERBOSITY"))
sys.meta_path.insert(0, Finder())
import diphase.cluster.cli
"""


class FakeGateway(InferenceServicer):
    """Answers every prompt with three words; refuses the empty one."""

    def __init__(self) -> None:
        self.requests: list[pb.GenerateRequest] = []
        self.metadata: list[dict[str, object]] = []

    async def Generate(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.GenerateResponse]:
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata() or ()))
        if not request.prompt and not request.HasField("chat"):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the prompt is empty")
        for word in ("one ", "two ", "three"):
            yield pb.GenerateResponse(text=word)
        yield pb.GenerateResponse(finish_reason=pb.FINISH_REASON_STOP, usage=pb.Usage(completion_tokens=3))


@pytest.fixture
async def gateway() -> AsyncIterator[tuple[str, FakeGateway]]:
    fake = FakeGateway()
    server = grpc.aio.server()
    add_InferenceServicer_to_server(fake, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}", fake
    await server.stop(None)


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    generate.add_arguments(parser)
    return parser.parse_args(words)


async def test_text_is_written_as_it_comes_and_the_last_response_returned(
    gateway: tuple[str, FakeGateway],
) -> None:
    address, _fake = gateway
    written: list[str] = []
    request = generate.request_from(arguments("hello"))
    last = await generate.print_stream(generate.stream(address, "", request), written.append)
    assert written[:3] == ["one ", "two ", "three"]
    assert last.usage.completion_tokens == 3


async def test_the_token_is_shown_to_the_gateway(gateway: tuple[str, FakeGateway]) -> None:
    address, fake = gateway
    async for _ in generate.stream(address, "secret", pb.GenerateRequest(prompt="x")):
        pass
    assert fake.metadata[0]["authorization"] == "Bearer secret"
    assert credentials("") == ()


async def test_a_refusal_is_an_error_with_the_gateways_sentence(gateway: tuple[str, FakeGateway]) -> None:
    address, _fake = gateway
    with pytest.raises(InvalidRequest, match="the prompt is empty"):
        async for _ in generate.stream(address, "", pb.GenerateRequest()):
            pass


async def test_nobody_there_is_an_error_that_says_so() -> None:
    with pytest.raises(ConfigError, match=r"no gateway answers at 127\.0\.0\.1:1"):
        async for _ in generate.stream("127.0.0.1:1", "", pb.GenerateRequest()):
            pass
    client = StatusClient("")
    with pytest.raises(ConfigError, match="no gateway answers"):
        await client.ask("127.0.0.1:1", 5.0)
    await client.close()


def test_options_become_the_request() -> None:
    request = generate.request_from(
        arguments("hi", "--chat", "--system", "be kind", "--max-tokens", "7", "--stop", "a", "--stop", "b")
    )
    assert [(message.role, message.content) for message in request.chat.messages] == [
        ("system", "be kind"),
        ("user", "hi"),
    ]
    assert request.sampling.max_tokens == 7
    assert request.request_id == ""
    assert generate.request_from(arguments("hi", "--request-id", "mine")).request_id == "mine"
    assert list(request.sampling.stop) == ["a", "b"]
    assert not request.sampling.HasField("temperature")


def test_a_number_that_no_request_can_carry_is_refused() -> None:
    for option, name, value in (("--max-tokens", "max_tokens", "-3"), ("--seed", "seed", "-1")):
        with pytest.raises(InvalidRequest) as caught:
            generate.request_from(arguments("hi", option, value))
        given: dict[str, Any] = {name: int(value)}
        with pytest.raises(InvalidRequest) as gateways:
            SamplingParams(**given)
        assert caught.value.message == gateways.value.message


def stdin(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr("sys.stdin", TextIOWrapper(BytesIO(content)))


def test_a_prompt_can_come_from_stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    stdin(monkeypatch, "ein längerer\nText\n".encode())
    assert generate.request_from(arguments("-")).prompt == "ein längerer\nText"
    stdin(monkeypatch, b"hello")
    assert generate.request_from(arguments("-", "--chat")).chat.messages[0].content == "hello"
    stdin(monkeypatch, b"\xff")
    with pytest.raises(InvalidRequest, match="stdin is not UTF-8"):
        generate.request_from(arguments("-"))


class Scripted:
    """In place of generate.stream(): some text, then an end or an error."""

    def __init__(self, error: DiphaseError | None = None, attempts: int = 1) -> None:
        self.error = error
        self.attempts = attempts

    async def __call__(self, *_args: object) -> AsyncIterator[pb.GenerateResponse]:
        yield pb.GenerateResponse(text="Paris")
        if self.error is not None:
            raise self.error
        yield pb.GenerateResponse(
            request_id="0123abcd",
            stages=pb.Stages(ttft_ms=12.345678901234567, prefill_worker="prefill-0", attempts=self.attempts),
        )


def test_stages_are_the_table_of_the_demo(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(generate, "stream", Scripted())
    assert main(["generate", "hi", "--stages"]) == 0
    out, err = capsys.readouterr()
    assert out == "Paris\n"
    [ttft] = [line for line in err.splitlines() if "TTFT  " in line]
    assert ttft.split() == ["│", "TTFT", "│", "12.3", "│"]
    assert "prefill-0" in err
    rows = [line.strip("│ ").split() for line in err.splitlines() if line.startswith("│")]
    assert rows[0] == ["request", "│", "0123abcd"]
    assert "attempts" not in err


def test_stages_say_how_many_attempts_there_were(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(generate, "stream", Scripted(attempts=2))
    assert main(["generate", "hi", "--stages"]) == 0
    [line] = [line for line in capsys.readouterr().err.splitlines() if "attempts" in line]
    assert line.strip("│ ").split() == ["attempts", "│", "2"]


def test_an_id_that_no_gateway_knows_is_answered_with_where_ids_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def unknown(*_args: object) -> None:
        raise NotFound("this gateway knows no request 'x'")

    monkeypatch.setattr(StatusClient, "trace", unknown)
    assert main(["trace", "x"]) == 2
    assert capsys.readouterr().err.startswith(
        "diphase trace: this gateway knows no request 'x'. `diphase generate --stages` prints"
    )


def test_an_error_after_some_text_stands_on_its_own_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(generate, "stream", Scripted(WorkerLost("it stopped")))
    assert main(["generate", "hi"]) == 1
    out, err = capsys.readouterr()
    assert out == "Paris\n"
    assert err == "diphase generate: it stopped\n"


def test_statuses_of_the_gateway_map_to_errors() -> None:
    refusal = grpc.aio.AioRpcError(
        grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.aio.Metadata(), grpc.aio.Metadata(), "queue is full", ""
    )
    error = from_rpc(refusal, "here:1")
    assert isinstance(error, Overloaded)
    assert error.message == "queue is full"


def test_config_prints_toml_with_comments(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--set", "pools.prefill.workers=3"]) == 0
    text = capsys.readouterr().out
    assert tomllib.loads(text)["pools"]["prefill"]["workers"] == 3
    assert "# Worker processes of the pool." in text
    comments = " ".join(line.removeprefix("# ") for line in text.splitlines())
    assert f"Names: {', '.join(TRANSPORT_CHOICES)}." in comments
    assert f"Names: {', '.join(name for name in CODECS if name != RAW)}." in comments


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["config", "--set", "pools.prefil.workers=1"], "did you mean pools.prefill?"),
        (["serve", "--set", "gateway.port=high"], "gateway.port must be an integer"),
        (["generate", "hi", "--address", "127.0.0.1:1"], "no gateway answers at 127.0.0.1:1"),
        (["status", "--address", "127.0.0.1:1"], "no gateway answers at 127.0.0.1:1"),
        (["generate", "hi", "--max-tokens", "-4"], "max_tokens"),
        (["config", "--set", "kv_transfer.host=224.0.0.1"], "kv_transfer.host = '224.0.0.1' is no address"),
        (["config", "--set", "kv_transfer.host=::0"], "kv_transfer.host = '::0' is no address"),
        (
            ["scale", "decode", "2", "--set", "engine.block_size=32"],
            "scale reads gateway.host, gateway.port, sec",
        ),
        (["generate", "hi", "--set", "engine.block_size=32"], "`diphase restart --with`"),
        (
            ["restart", "--set", "engine.block_size=32"],
            "would change nothing: restart reads gateway.host, gateway.port, security.cluster_token only; "
            "--with engine.block_size=32 gives it to the new workers",
        ),
        (["status", "--set", "gateway.port=1"], "no gateway answers at 127.0.0.1:1"),
        (["generate", "\udcff"], "PROMPT '\\udcff' is not UTF-8"),
        (["trace", "a\udcff"], "REQUEST_ID 'a\\udcff' is not UTF-8"),
        (["restart", "--with", "engine.block_size=\udcff"], "is not UTF-8"),
        (
            ["config", "--set", "kv_transfer.codecs=int8"],
            'must be an array like ["int8"] (in a shell: --set kv_transfer.codecs=\'["int8"]\'), not',
        ),
        (
            ["config", "--set", 'kv_transfer.codecs=["gzip"]'],
            "kv_transfer.codecs = ['gzip']: codec 'gzip' is",
        ),
        (
            ["config", "--set", "kv_transfer.staging_window_mib=65"],
            "does not fit into kv_transfer.staging_mib = 64",
        ),
        (
            ["config", "--set", "kv_transfer.staging_mib=15"],
            "kv_transfer.staging_window_mib = 16 does not fit",
        ),
        (
            ["config", "--set", "kv_transfer.staging_mib=0", "--set", "kv_transfer.staging=always"],
            'kv_transfer.staging = "always" contradicts kv_transfer.staging_mib = 0',
        ),
        (
            ["config", "--set", "kv_transfer.staging=never", "--set", 'kv_transfer.codecs=["int8"]'],
            "kv_transfer.codecs = ['int8'] contradicts kv_transfer.staging = \"never\"",
        ),
        (
            ["config", "--set", "kv_transfer.staging_mib=0", "--set", 'kv_transfer.codecs=["fp8"]'],
            "kv_transfer.codecs = ['fp8'] contradicts kv_transfer.staging_mib = 0",
        ),
    ],
)
def test_mistakes_are_one_sentence_and_status_2(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"diphase {words[0]}: ")
    assert sentence in errors
    assert errors.count("\n") == 1


def test_a_configuration_file_is_named_in_its_mistakes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "c.toml"
    file.write_text("[model]\nnme = 1\n")
    assert main(["config", "--config", str(file)]) == 2
    assert f"{file}: unknown key model.nme; did you mean model.name?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "usage", "sentence"),
    [
        (["serve", "--modle", "x"], "usage: diphase serve ", "unknown option --modle; known are "),
        (["serve", "--confg=x"], "usage: diphase serve ", "unknown option --confg; did you mean --config?"),
        (
            ["generate", "hi", "--max-tokns", "3"],
            "usage: diphase generate ",
            "unknown option --max-tokns; did you mean --max-tokens?",
        ),
        (
            ["generate", "The", "capital", "of", "France"],
            "usage: diphase generate ",
            'quote it: diphase generate "The capital of France"',
        ),
        (["config", "engine"], "usage: diphase config ", "config takes options only, not engine"),
        (["stauts"], "usage: diphase ", "unknown command stauts; did you mean status?"),
        (
            ["x"],
            "usage: diphase ",
            "known are serve, generate, status, trace, scale, restart, bench, plan, profile, validate",
        ),
    ],
)
def test_a_slip_of_the_keyboard_is_answered_with_what_was_meant(
    words: list[str], usage: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    errors = capsys.readouterr().err
    assert errors.startswith(usage)
    assert sentence in errors


def test_without_a_command_all_of_them_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    lines = capsys.readouterr().err.splitlines()
    listed = [line.split()[0] for line in lines if re.match(r" {4}\w", line)]
    assert listed == list(COMMANDS)


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"diphase {version('diphase')}\n"


@pytest.mark.parametrize(("given", "found"), [({}, "NONE"), ({"GRPC_VERBOSITY": "ERROR"}, "ERROR")])
def test_grpcs_core_is_silent_unless_the_user_wants_to_hear_it(given: dict[str, str], found: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "GRPC_VERBOSITY"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", VERBOSITY],
        env={**environment, **given},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.split() == [found]
