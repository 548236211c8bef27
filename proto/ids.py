"""Names of requests, attempts and processes."""

from __future__ import annotations

import re
from typing import NamedTuple

from .clock import Rng
from .errors import InvalidRequest

PROTOCOL_VERSION = 2
"""Of worker.proto and handoff.proto; peers of different versions never pair."""

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}\Z")


class HandoffKey(NamedTuple):
    """What one hand-off is known by: a request and its attempt (epoch)."""

    request_id: str
    attempt: int


def draw_id(rng: Rng, prefix: str = "") -> str:
    """A fresh 96-bit identifier (request_id, incarnation, cluster name), hexadecimal after `prefix`."""
    return f"{prefix}{rng.getrandbits(96):024x}"


def check_request_id(request_id: str) -> str:
    """Returns the id unchanged.

    Raises:
        InvalidRequest: it is empty, too long or has characters outside [A-Za-z0-9._:-].
    """
    if _REQUEST_ID.match(request_id) is None:
        raise InvalidRequest(
            f"request_id {request_id[:140]!r} must be 1 to 128 characters of letters, digits and . _ : -"
        )
    return request_id
