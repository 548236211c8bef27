"""`diphase scale` and `diphase restart`: what they ask for, print and end with."""

from __future__ import annotations

from collections.abc import AsyncIterator
from io import StringIO
from typing import Any

import grpc
import grpc.aio
import pytest
from diphase.cluster.cli import main
from diphase.cluster.config import load
from diphase.cluster.config_change import changed
from diphase.cluster.scale import follow
from diphase.cluster.status_notes import notes
from diphase.proto import cluster_pb2 as pb
from diphase.proto.clock import system_rng
from diphase.proto.cluster_pb2_grpc import ClusterServicer, add_ClusterServicer_to_server
from diphase.proto.errors import ConfigError, DiphaseError, WorkerLost
from diphase.proto.worker_pb2 import Load
from rich.console import Console

SCALE = pb.ChangeRequest(scale=pb.Scale(pool="decode", workers=2))


class FakeGateway(ClusterServicer):
    def __init__(self) -> None:
        self.asked: list[pb.ChangeRequest] = []
        self.refusal: tuple[grpc.StatusCode, str] | None = None

    async def Change(
        self, request: pb.ChangeRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.ChangeProgress]:
        self.asked.append(request)
        yield pb.ChangeProgress(worker_id="decode-1", step="starts")
        if self.refusal is not None:
            await context.abort(*self.refusal)
        yield pb.ChangeProgress(step="decode has [2] workers")


@pytest.fixture
async def gateway() -> AsyncIterator[tuple[str, FakeGateway]]:
    fake = FakeGateway()
    server = grpc.aio.server()
    add_ClusterServicer_to_server(fake, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}", fake
    await server.stop(None)


async def test_each_step_is_a_line(gateway: tuple[str, FakeGateway]) -> None:
    address, fake = gateway
    out = StringIO()
    await follow(SCALE, address, "", Console(file=out))
    assert out.getvalue() == "decode-1: starts\ndecode has [2] workers\n"
    assert fake.asked == [SCALE]


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, ConfigError),
        (grpc.StatusCode.ABORTED, WorkerLost),
        (grpc.StatusCode.UNAVAILABLE, WorkerLost),
    ],
)
async def test_a_refusal_is_told_in_the_supervisors_words(
    gateway: tuple[str, FakeGateway], code: grpc.StatusCode, kind: type[DiphaseError]
) -> None:
    address, fake = gateway
    fake.refusal = (code, "no room here")
    with pytest.raises(kind, match=r"^no room here$"):
        await follow(SCALE, address, "", Console(file=StringIO()))


async def test_without_a_gateway_it_says_so() -> None:
    with pytest.raises(ConfigError, match=r"no gateway answers at 127\.0\.0\.1:1"):
        await follow(SCALE, "127.0.0.1:1", "", Console(file=StringIO()))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("scale", "decode", "-1"), "N = -1 is no number of workers"),
        (("scale", "decode", "2", "--timeout-s", "-5"), "--timeout-s -5 is no time"),
        (("restart", "--timeout-s", "nan"), "--timeout-s nan is no time"),
    ],
)
def test_numbers_that_make_no_sense_are_refused_here(
    words: tuple[str, ...], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert sentence in capsys.readouterr().err


CONFIG = load(None, ("engine.block_size=32", "security.cluster_token=t0ken", "name=n"), system_rng())


def test_a_restart_can_change_what_workers_do() -> None:
    new = changed(CONFIG, ["kv_transfer.lease_s=12.5", "pools.decode.max_running=9"])
    assert (new.kv_transfer.lease_s, new.pools.decode.scheduler.max_running) == (12.5, 9)
    assert new.engine.block_size == 32
    assert (new.security, new.store, new.name) == (CONFIG.security, CONFIG.store, CONFIG.name)
    assert new.host == CONFIG.host
    assert changed(CONFIG, []) is CONFIG


@pytest.mark.parametrize("key", ["host.drain_timeout_s", "supervisor.change_timeout_s"])
@pytest.mark.parametrize("value", ["0", "-1", "1e9"])
def test_deadlines_are_checked(key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"{key} = .* is out of range"):
        load(None, (f"{key}={value}",), system_rng())


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("gateway.port=9", "gateway: a restart changes workers only"),
        ("gateway.port=50051", "gateway: a restart changes workers only"),
        ("model.name=dummy:tiny", "model: a restart changes workers only"),
        ("name=other", "name: a restart changes workers only"),
        ("store.url=redis://127.0.0.1:1", "store: a restart changes workers only"),
        ("security.cluster_token=other", "security: a restart changes workers only"),
        (
            "pools.prefill.gpus=1",
            r"pools\.prefill\.gpus: a restart leaves .* needs a new start of the cluster",
        ),
        ("pools.decode.tensor_parallel=3", r"pools\.decode\.tensor_parallel: .* a new start of the cluster"),
        ("pools.decode.workers=3", r"pools\.decode\.workers: .*; `diphase scale decode 3` does that"),
        ("engine.block_sise=8", "--with engine.block_sise=8: unknown key .* did you mean engine.block_size"),
        ("engine.block_size=7", "engine.block_size = 7 is not possible"),
        ("kv_transfer.transport=ib", "kv_transfer.transport = 'ib' is unknown; use one of auto, cuda_ipc"),
        ("engine", "--with engine: write it as section.key=value"),
    ],
)
def test_what_a_restart_cannot_change_is_refused(setting: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        changed(CONFIG, [setting])


def draining(load: dict[str, Any]) -> pb.GetStatusResponse:
    worker = pb.WorkerStatus(worker_id="prefill-0", state="draining", load=Load(**load))
    return pb.GetStatusResponse(workers=[worker])


@pytest.mark.parametrize(
    ("load", "sentence"),
    [
        ({"running": 1, "waiting_requests": 2}, "prefill-0 drains: 3 requests, 0 leases left"),
        ({"running": 1, "handoffs": 1}, "prefill-0 drains: 1 request, 1 lease left"),
        ({"handoffs": 2}, "prefill-0 has drained but still serves its 2 leases"),
        ({}, "prefill-0 has drained"),
    ],
)
def test_who_takes_its_leave_and_what_it_still_has_is_told(load: dict[str, Any], sentence: str) -> None:
    assert list(notes(draining(load))) == [sentence]


def test_who_cannot_hand_over_to_whom_is_told_and_a_long_list_is_cut() -> None:
    pairs = [pb.Mismatch(prefill=f"p{i}", decode="d", reason="KV layouts a and b") for i in range(9)]
    lines = list(notes(pb.GetStatusResponse(mismatches=pairs)))
    assert lines[0] == "p0 never hands over to d: KV layouts a and b"
    assert lines[-1] == "and 3 more pairs that do not fit"
    assert len(lines) == 7
