"""`diphase status`: the table of a cluster, alive or gone."""

from __future__ import annotations

import asyncio
from io import StringIO

import pytest
from diphase.cluster.status import ask, watch
from diphase.cluster.terminal import status_table, transfers_table
from diphase.proto import cluster_pb2
from diphase.proto.errors import ConfigError
from diphase.proto.worker_pb2 import Load, TransferFigures
from rich.console import Console, RenderableType

from ..simulation.virtual_loop import run_virtually
from .test_endpoint import FakeClient

GONE = "no gateway answers at g:1"


def shown(view: RenderableType, width: int = 80) -> list[str]:
    out = StringIO()
    Console(file=out, width=width).print(view)
    assert out.getvalue().endswith("\n")
    return out.getvalue().splitlines()


class Answers(FakeClient):
    """A gateway with scripted metrics addresses, one an answer; None where it does not answer."""

    def __init__(self, *metrics_addresses: str | None) -> None:
        super().__init__({"prefill-0"})
        self.answers = list(metrics_addresses)

    async def ask(
        self, address: str, timeout_s: float, *, transfers: bool = False
    ) -> cluster_pb2.GetStatusResponse:
        if not self.answers:
            raise asyncio.CancelledError
        if (metrics_address := self.answers.pop(0)) is None:
            raise ConfigError(GONE)
        status = await super().ask(address, timeout_s, transfers=transfers)
        status.metrics_address = metrics_address
        return status


def watched(client: Answers) -> list[str]:
    views: list[str] = []
    with pytest.raises(asyncio.CancelledError):
        run_virtually(
            watch(client, "g:1", 0.5, lambda view: views.append("\n".join(shown(view)))),
        )
    return views


def test_a_watch_outlives_its_cluster_and_finds_the_next() -> None:
    before, gone, after = watched(Answers("g:9", None, "g:10"))
    assert "http://g:9/metrics" in before
    assert "http://g:9/metrics" in gone, "the last table stays"
    assert "http://g:10/metrics" in after
    assert [GONE in view for view in (before, gone, after)] == [False, True, False]
    assert "still trying" in gone


def test_a_watch_of_nothing_ends_at_once() -> None:
    with pytest.raises(ConfigError, match=GONE):
        run_virtually(watch(Answers(None), "g:1", 0.5, lambda _view: None))


@pytest.mark.parametrize(
    ("told", "address", "reachable"),
    [
        ("0.0.0.0:9000", "node:50051", "node:9000"),
        ("[::]:9000", "[fd00::1]:50051", "[fd00::1]:9000"),
        ("127.0.0.1:9000", "127.0.0.1:50051", "127.0.0.1:9000"),
        ("", "node:50051", ""),
    ],
)
def test_the_gateways_metrics_are_where_the_gateway_is(told: str, address: str, reachable: str) -> None:
    assert run_virtually(ask(Answers(told), address)).metrics_address == reachable


def test_the_table_fits_80_columns() -> None:
    load = Load(waiting_requests=120, running=16, blocks_total=12_345, blocks_free=0, handoffs=12)
    worker = cluster_pb2.WorkerStatus(
        worker_id="prefill-10", state="connecting", load=load, heartbeat_age_s=120.0
    )
    status = cluster_pb2.GetStatusResponse(model="m", gateway_id="gateway-0", workers=[worker])
    lines = shown(status_table(status, ""))
    [row] = [line for line in lines if "prefill-10" in line]
    for word in ("connecting", "120 ", " 16 ", "12345/12345 100 %", " 12 ", "120 s"):
        assert word in row
    assert "…" not in "".join(lines)


def test_the_table_of_transfers_fits_80_columns_and_shows_the_last_one() -> None:
    sent = TransferFigures(
        peer="decode-10", transport="cuda_ipc", outgoing=True, transfers=12_345, bytes=1001 * 2**20,
        wire_s=1234.5, fences=123, quarantined_blocks=1234, failures={"deadline_exceeded": 90, "lost": 9},
    )  # fmt: skip
    received = TransferFigures(peer="prefill-10", transport="tcp", transfers=1, bytes=9 * 1024, verify_s=0.5)
    status = cluster_pb2.GetStatusResponse(
        workers=[
            cluster_pb2.WorkerStatus(worker_id="prefill-10", transfers=[sent]),
            cluster_pb2.WorkerStatus(worker_id="decode-10", transfers=[received]),
        ]
    )
    table = transfers_table(status)
    assert table is not None
    text = "\n".join(lines := shown(table))
    for word in ("prefill-10 → decode-10", "cuda_ipc", "12345", "1001 MiB", "1234.50 s", "123", "1234", "99"):
        assert word in text
    [row] = [line for line in lines if "decode-10 ← prefill-10" in line]
    assert row.split()[3:] == ["tcp", "1", "9", "KiB", "0.50", "s", "0", "0", "0"]
    assert "took: on the wire (→ sent), in its check (← received), summed" in text
    assert "prefill-10 → decode-10, failed: 90 deadline_exceeded, 9 lost" in text
    assert "…" not in text
    assert transfers_table(cluster_pb2.GetStatusResponse()) is None


def test_how_far_steps_are_from_their_prediction_is_said_of_workers_that_have_some() -> None:
    status = cluster_pb2.GetStatusResponse(
        model="m",
        workers=[
            cluster_pb2.WorkerStatus(
                worker_id="prefill-0", step_error=0.124, step_bias=0.1, predicted_steps=9
            ),
            cluster_pb2.WorkerStatus(
                worker_id="decode-0", step_error=0.031, step_bias=-0.02, predicted_steps=70
            ),
            cluster_pb2.WorkerStatus(worker_id="decode-1"),
        ],
    )
    text = " ".join(" ".join(shown(status_table(status, ""))).split())
    assert "steps beside their prediction: decode-0 ±3% (-2%), prefill-0 ±12% (+10%)" in text
    assert "decode-1 ±" not in text
