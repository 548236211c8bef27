"""The one error tree. Every error that can reach a person or a wire is one of these.

    DiphaseError
    ├── ConfigError            a value in the configuration is wrong
    ├── InvalidRequest         the client sent something that can never work
    │   └── PromptTooLong      prompt (and completion) do not fit the model's context
    ├── NotFound               no such model or request
    ├── CheckpointError        a model on disk lacks something or is of an unknown kind
    ├── KernelError            wrong shape, dtype, device or stride given to a kernel
    ├── Overloaded             a hard limit is reached; retry after `retry_after_s`
    ├── SloInfeasible          no placement can meet the request's SLO
    ├── Cancelled              the client went away or asked for it
    ├── Unauthenticated        the cluster token is missing or wrong
    ├── TransferError          a hand-off failed
    │   ├── PeerLost           the other side died, hangs or was restarted
    │   ├── DigestMismatch     the bytes that arrived are not those that were sent
    │   └── DeadlineExceeded   nothing moved for too long
    ├── WorkerLost             the worker that had the request is gone
    ├── Draining               this process takes no new work
    ├── OutOfBlocks            the KV pool has no room left
    └── InternalError          a bug; the message says where

Each class has a wire `code` (WireError.code), says whether a retry can help, and names the HTTP and the gRPC
status that a gateway answers with.
"""

from __future__ import annotations

from typing import ClassVar


class DiphaseError(Exception):
    """Base of all. `message` is a sentence that says what is wrong and what to change."""

    code: ClassVar[str] = "internal"
    retryable: ClassVar[bool] = False
    http_status: ClassVar[int] = 500
    grpc_status: ClassVar[str] = "INTERNAL"

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after_s = retry_after_s


class ConfigError(DiphaseError):
    code = "config"
    http_status = 400
    grpc_status = "INVALID_ARGUMENT"


class InvalidRequest(DiphaseError):
    code = "invalid_request"
    http_status = 400
    grpc_status = "INVALID_ARGUMENT"


class PromptTooLong(InvalidRequest):
    code = "prompt_too_long"


class NotFound(DiphaseError):
    code = "not_found"
    http_status = 404
    grpc_status = "NOT_FOUND"


class CheckpointError(DiphaseError):
    code = "checkpoint"
    grpc_status = "FAILED_PRECONDITION"


class KernelError(DiphaseError):
    code = "kernel"


class Overloaded(DiphaseError):
    code = "overloaded"
    retryable = True
    http_status = 429
    grpc_status = "RESOURCE_EXHAUSTED"


class SloInfeasible(DiphaseError):
    code = "slo_infeasible"
    retryable = True
    http_status = 429
    grpc_status = "RESOURCE_EXHAUSTED"


class Cancelled(DiphaseError):
    code = "cancelled"
    http_status = 499
    grpc_status = "CANCELLED"


class Unauthenticated(DiphaseError):
    code = "unauthenticated"
    http_status = 401
    grpc_status = "UNAUTHENTICATED"


class TransferError(DiphaseError):
    code = "transfer"
    retryable = True
    http_status = 503
    grpc_status = "UNAVAILABLE"


class PeerLost(TransferError):
    code = "peer_lost"


class DigestMismatch(TransferError):
    code = "digest_mismatch"


class DeadlineExceeded(TransferError):
    code = "deadline_exceeded"
    http_status = 504


class WorkerLost(DiphaseError):
    code = "worker_lost"
    retryable = True
    http_status = 503
    grpc_status = "UNAVAILABLE"


class Draining(DiphaseError):
    code = "draining"
    retryable = True
    http_status = 503
    grpc_status = "UNAVAILABLE"


class OutOfBlocks(DiphaseError):
    code = "out_of_blocks"
    retryable = True
    http_status = 503
    grpc_status = "RESOURCE_EXHAUSTED"


class InternalError(DiphaseError):
    pass


def all_errors() -> dict[str, type[DiphaseError]]:
    """Every class of the tree by its wire code."""
    found: dict[str, type[DiphaseError]] = {InternalError.code: InternalError}
    pending: list[type[DiphaseError]] = [DiphaseError]
    while pending:
        for cls in pending.pop().__subclasses__():
            found[cls.code] = cls
            pending.append(cls)
    return found


def from_wire(code: str, message: str) -> DiphaseError:
    """The exception that a peer sent as (code, message); an unknown code becomes InternalError."""
    return all_errors().get(code, InternalError)(message)
