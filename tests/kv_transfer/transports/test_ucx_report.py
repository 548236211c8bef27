"""What is read from UCX's log."""

from __future__ import annotations

import logging
import os

import pytest
from diphase.kv_transfer.transports.ucx_report import UcxReport

LOG = """\
[1795292169.46] [vm:16398:0]   +--------+-------------+-----------------------------------+
[1795292169.46] [vm:16398:0]   | src self cfg#0                                           |
[1795292169.46] [vm:16398:0]   | remote memory write by ucp_put* from host memory to host |
[1795292169.46] [vm:16398:0]   | Range  | Description |              Config               |
[1795292169.46] [vm:16398:0]   | 0..inf | zero-copy   | cma/memory                        |
[1795292171.81] [vm:16519:0]   +--------+-------------+-----------------------------------+
[1795292171.81] [vm:16519:0]   | src intra-node cfg#1                                     |
[1795292171.81] [vm:16519:0]   | active message by ucp_am_send* from host memory          |
[1795292171.81] [vm:16519:0]   | 0..inf | short       | tcp/lo                            |
[1795292171.81] [vm:16519:0]   | src intra-node cfg#1                                     |
[1795292171.81] [vm:16519:0]   | remote memory write by ucp_put* from host memory to host |
[1795292171.81] [vm:16519:0]   +--------+-------------+-----------------------------------+
[1795292171.81] [vm:16519:0]   | Range  | Description |              Config               |
[1795292171.81] [vm:16519:0]   +--------+-------------+-----------------------------------+
[1795292171.81] [vm:16519:0]   | 0..91  | short       | tcp/lo                            |
[1795292171.81] [vm:16519:0]   | 92..inf| zero-copy   | 52% on tcp/lo and 48% on tcp/eth0 |
[1795292171.90] [vm:16519:0]     tcp_ep.c:1260 UCX  ERROR  no route
"""
WANTED = [
    "connection='src intra-node cfg#1' memory='host memory to host' bytes=0..91 lanes='short tcp/lo'",
    "connection='src intra-node cfg#1' memory='host memory to host' bytes=92..inf "
    "lanes='zero-copy 52% on tcp/lo and 48% on tcp/eth0'",
]


def test_lanes_of_writes_to_peers_are_found_and_complaints_passed_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert UcxReport().read(LOG) == WANTED
    assert [record.getMessage() for record in caplog.records] == ["ucx_complains what='no route'"]


@pytest.mark.parametrize("at", range(0, len(LOG), 37))
def test_a_log_read_in_two_pieces_says_the_same(at: int) -> None:
    report = UcxReport()
    assert report.read(LOG[:at]) + report.read(LOG[at:]) == WANTED


def test_each_choice_is_told_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    report = UcxReport()
    monkeypatch.setattr(report, "_new_text", lambda: LOG)
    with caplog.at_level(logging.INFO, logger="diphase"):
        report.tell()
        report.tell()
    lanes = [r.getMessage() for r in caplog.records if r.getMessage().startswith("ucx_lanes")]
    assert lanes == [f"ucx_lanes {choice}" for choice in WANTED]


def test_the_environment_is_as_before_and_somebody_elses_log_stays_his(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("diphase.kv_transfer.transports.ucx_report._ucx_is_loaded", lambda: False)
    for name in ("UCX_LOG_FILE", "UCX_PROTO_INFO"):
        monkeypatch.delenv(name, raising=False)
    with UcxReport().listening():
        assert os.environ["UCX_LOG_FILE"].startswith("/proc/self/fd/")
        assert os.environ["UCX_PROTO_INFO"] == "y"
    assert "UCX_LOG_FILE" not in os.environ
    assert "UCX_PROTO_INFO" not in os.environ
    monkeypatch.setenv("UCX_LOG_FILE", "elsewhere")
    with UcxReport().listening():
        assert os.environ["UCX_LOG_FILE"] == "elsewhere"
        assert "UCX_PROTO_INFO" not in os.environ
