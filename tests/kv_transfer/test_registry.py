"""What `auto` opens, and in which order."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from diphase.kv_transfer.base import Region
from diphase.kv_transfer.config import IN_PROCESS, TRANSPORTS, KvTransferConfig
from diphase.kv_transfer.registry import auto_order, has_fabric, open_transports
from diphase.kv_transfer.transports.tcp import TcpTransport
from diphase.proto.clock import MonotonicClock


def test_a_fabric_is_an_rdma_device(tmp_path: Path) -> None:
    assert not has_fabric(tmp_path / "infiniband")
    (tmp_path / "infiniband").mkdir()
    assert not has_fabric(tmp_path / "infiniband")
    (tmp_path / "infiniband" / "mlx5_0").mkdir()
    assert has_fabric(tmp_path / "infiniband")


def test_on_a_fabric_nixl_comes_before_tcp_and_behind_shm() -> None:
    order = auto_order(TRANSPORTS, fabric=True, in_process=False)
    assert order.index("shm") < order.index("nixl") < order.index("tcp")


def test_without_a_fabric_nixl_is_not_opened() -> None:
    with_fabric = auto_order(TRANSPORTS, fabric=True, in_process=False)
    without = auto_order(TRANSPORTS, fabric=False, in_process=False)
    assert without == [name for name in with_fabric if name != "nixl"]


def test_only_roles_of_one_process_meet_in_it() -> None:
    assert IN_PROCESS not in auto_order(TRANSPORTS, fabric=True, in_process=False)
    assert auto_order(TRANSPORTS, fabric=True, in_process=True)[0] == IN_PROCESS


def test_the_log_says_why_each_other_transport_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("diphase.kv_transfer.registry.has_fabric", lambda: False)
    caplog.set_level("INFO", logger="diphase.kv_transfer.registry")
    here, there = (
        open_transports(
            KvTransferConfig(),
            incarnation=incarnation,
            pools=[Region(buffer=memoryview(bytearray(64)))],
            clock=MonotonicClock(),
        )
        for incarnation in ("a", "b")
    )
    assert here.choose(there.endpoints()) == "tcp"
    chosen = caplog.messages[-1]
    assert chosen.startswith("transport_chosen name=tcp passed_over=")
    assert "nixl: there is no RDMA device" in chosen
    for name in ("cuda_ipc", "shm", "nccl"):  # no memory of a GPU, no memfd
        assert f"{name}: " in chosen
    here.close()
    there.close()


class CrashingTransport(TcpTransport):
    """Has a mistake."""

    def register(self, region: Region) -> int:
        raise AttributeError("a bug")


def test_a_transport_that_crashes_leaves_no_other_one_open(monkeypatch: pytest.MonkeyPatch) -> None:
    offered = {"tcp": TRANSPORTS["tcp"], "crashing": f"{__name__}:{CrashingTransport.__name__}"}
    monkeypatch.setattr("diphase.kv_transfer.registry.TRANSPORTS", offered)
    before = set(threading.enumerate())
    with pytest.raises(AttributeError, match="a bug"):
        open_transports(
            KvTransferConfig(),
            incarnation="a",
            pools=[Region(buffer=memoryview(bytearray(64)))],
            clock=MonotonicClock(),
        )
    assert set(threading.enumerate()) == before
