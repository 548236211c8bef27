"""The error tree: complete on the wire, honest about retries and statuses."""

from __future__ import annotations

import grpc
import pytest
from diphase.proto import errors


def classes() -> list[type[errors.DiphaseError]]:
    return [
        value
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, errors.DiphaseError)
    ]


def test_every_class_has_a_wire_code_of_its_own() -> None:
    leaves = [cls for cls in classes() if cls is not errors.DiphaseError]
    assert len({cls.code for cls in leaves}) == len(leaves)
    assert errors.all_errors() == {cls.code: cls for cls in leaves}


@pytest.mark.parametrize("cls", classes(), ids=lambda cls: cls.__name__)
def test_every_class_is_drawn_in_the_tree_of_the_docstring(cls: type[errors.DiphaseError]) -> None:
    assert cls.__name__ in (errors.__doc__ or "").split()


@pytest.mark.parametrize("cls", classes(), ids=lambda cls: cls.__name__)
def test_statuses_exist_and_no_error_is_a_success(cls: type[errors.DiphaseError]) -> None:
    assert grpc.StatusCode[cls.grpc_status] is not grpc.StatusCode.OK
    assert 400 <= cls.http_status < 600


def test_client_faults_cannot_be_retried_and_lost_peers_can() -> None:
    assert not any(
        cls.retryable
        for cls in (errors.InvalidRequest, errors.PromptTooLong, errors.NotFound, errors.ConfigError)
    )
    assert all(
        cls.retryable for cls in (errors.WorkerLost, errors.PeerLost, errors.Draining, errors.Overloaded)
    )


@pytest.mark.parametrize(
    "cls", [c for c in classes() if c is not errors.DiphaseError], ids=lambda c: c.__name__
)
def test_an_error_survives_the_wire(cls: type[errors.DiphaseError]) -> None:
    arrived = errors.from_wire(cls.code, "the sentence")
    assert type(arrived) is cls
    assert arrived.message == "the sentence"
    assert str(arrived) == "the sentence"


def test_a_code_of_a_newer_peer_becomes_an_internal_error() -> None:
    assert type(errors.from_wire("invented_later", "x")) is errors.InternalError


def test_retry_after_travels_with_the_error() -> None:
    assert errors.Overloaded("full", retry_after_s=1.5).retry_after_s == 1.5
    assert errors.Overloaded("full").retry_after_s is None
