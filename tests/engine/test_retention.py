"""What a worker remembers of requests is complete and bounded."""

from __future__ import annotations

from diphase.engine.requests import cancelled_output
from diphase.engine.retention import Retention
from diphase.proto import worker_pb2 as pb
from diphase.proto.ids import HandoffKey

from .sequences import make_submit


def output(request_id: str, index: int, *token_ids: int, attempt: int = 0) -> pb.SequenceOutput:
    return pb.SequenceOutput(request_id=request_id, attempt=attempt, index=index, token_ids=token_ids)


def test_tokens_of_earlier_attempts_come_first() -> None:
    retention = Retention(8, 60.0)
    retention.open(make_submit("r", [1], attempt=1, emitted=[7, 8]), "g", 10.0)
    retention.record(output("r", 2, 9, attempt=1), 11.0)
    found = retention.get("r")
    assert found is not None
    resumed = found.to_resumed(15.0)
    assert list(resumed.token_ids) == [7, 8, 9]
    assert resumed.submit.elapsed_s == 5.0


def test_outputs_of_other_attempts_are_nobodys() -> None:
    retention = Retention(8, 60.0)
    retention.open(make_submit("r", [1], attempt=1), "g", 0.0)
    assert retention.record(output("r", 0, 9, attempt=0), 0.0) is None
    assert retention.record(output("other", 0, 9), 0.0) is None
    retention.record(cancelled_output(HandoffKey("r", 1), 0), 0.0)
    assert retention.record(output("r", 0, 9, attempt=1), 0.0) is None


def test_only_so_many_ended_requests_are_kept() -> None:
    retention = Retention(2, 60.0)
    for i in range(4):
        retention.open(make_submit(f"r{i}", [1]), "g", 0.0)
    for i in range(4):
        retention.record(cancelled_output(HandoffKey(f"r{i}", 0), 0), float(i))
    assert [retention.get(f"r{i}") is not None for i in range(4)] == [False, False, True, True]
    assert len(retention) == 2


def test_an_acknowledged_attempt_is_forgotten_and_a_newer_one_is_not() -> None:
    retention = Retention(8, 60.0)
    retention.open(make_submit("r", [1], attempt=1), "g", 0.0)
    retention.acknowledge("r", 5)
    assert retention.get("r") is not None
    retention.record(cancelled_output(HandoffKey("r", 1), 0), 0.0)
    retention.acknowledge("r", 0)
    assert retention.get("r") is not None
    retention.acknowledge("r", 1)
    assert retention.get("r") is None


def test_a_takeover_that_came_early_is_remembered_once_and_for_a_while() -> None:
    retention = Retention(2, 60.0)
    retention.redirect("r", "new", 0.0)
    retention.redirect("s", "new", 50.0)
    assert retention.redirected("r") == "new"
    assert retention.redirected("r") is None
    retention.expire(110.0)
    assert retention.redirected("s") is None


def test_a_retired_attempt_is_gone_unless_a_newer_one_came() -> None:
    retention = Retention(8, 60.0)
    retention.open(make_submit("r", [1], attempt=1), "g", 0.0)
    retention.retire(HandoffKey("r", 0))
    assert retention.get("r") is not None
    retention.retire(HandoffKey("r", 1))
    assert len(retention) == 0
