"""What a transport tells its peers about itself, as bytes: JSON with transport, version, incarnation and
more."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from ..proto.errors import TransferError

VERSION = 1
"""Of endpoints and handshakes; peers of different versions never connect."""


def write_endpoint(transport: str, incarnation: str, **more: Any) -> bytes:
    fields = {"transport": transport, "version": VERSION, "incarnation": incarnation, **more}
    return json.dumps(fields).encode()


def read_endpoint(data: bytes | bytearray, transport: str, types: Mapping[str, type]) -> dict[str, Any]:
    """The fields, of which `types` and the incarnation are known to be there and of these types.

    Raises:
        TransferError: malformed, or of another transport or version.
    """
    try:
        fields = json.loads(data)
        # Half a surrogate pair, which JSON can spell, could be neither compared nor answered nor logged.
        json.dumps(fields, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise TransferError(f"malformed endpoint for transport {transport}: {bytes(data[:80])!r}") from error
    if not isinstance(fields, dict):
        raise TransferError(f"malformed endpoint for transport {transport}: {bytes(data[:80])!r}")
    found = (fields.get("transport"), fields.get("version"))
    if found != (transport, VERSION):
        raise TransferError(
            f"the endpoint is of transport {found[0]} version {found[1]}, "
            f"not of {transport} version {VERSION}"
        )
    for name, kind in {**types, "incarnation": str}.items():
        if not isinstance(fields.get(name), kind):
            raise TransferError(f"the endpoint of transport {transport} lacks {name}")
    return fields


def read_sizes(sizes: Collection[Any]) -> list[int]:
    """Region sizes from an endpoint.

    Raises:
        TransferError: they are no sizes.
    """
    if not all(isinstance(size, int) and size >= 0 for size in sizes):
        raise TransferError(f"malformed region sizes: {sizes!r}")
    return list(sizes)
