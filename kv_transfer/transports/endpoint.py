"""What a transport tells its peers about itself, as bytes: JSON with transport, version, incarnation and
more. Bytes travel as base64; whatever comes is read by name and type, and nothing of it is ever executed."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Collection, Mapping
from typing import Any

from ...proto.errors import TransferError

VERSION = 2
"""Of endpoints and handshakes; peers of different versions never connect."""
MAX_REGIONS = 1024


def write_endpoint(transport: str, incarnation: str, **more: Any) -> bytes:
    fields = {"transport": transport, "version": VERSION, "incarnation": incarnation, **more}
    return json.dumps(fields, default=lambda data: base64.b64encode(data).decode()).encode()


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
    if found != (transport, VERSION) or isinstance(found[1], bool | float):
        raise TransferError(
            f"the endpoint is of transport {found[0]} version {found[1]}, "
            f"not of {transport} version {VERSION}"
        )
    check_fields(fields, transport, {"incarnation": str, **types})
    return fields


def check_fields(fields: dict[str, Any], transport: str, types: Mapping[str, type]) -> None:
    """Makes sure that `types` are there and of these types; turns bytes back into what they were.

    Raises:
        TransferError: a field is missing or of another type.
    """
    for name, kind in types.items():
        if name not in fields:
            raise TransferError(f"the endpoint of transport {transport} lacks {name}")
        value = fields[name]
        if kind is bytes and isinstance(value, str):
            try:
                fields[name] = base64.b64decode(value, validate=True)
            except (binascii.Error, ValueError) as error:
                raise TransferError(
                    f"{name} in the endpoint of transport {transport} is no base64"
                ) from error
        elif not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise TransferError(
                f"{name} in the endpoint of transport {transport} is {type(value).__name__}, "
                f"not {kind.__name__}"
            )


def read_sizes(sizes: Collection[Any]) -> list[int]:
    """Region sizes from an endpoint.

    Raises:
        TransferError: they are no sizes.
    """
    if len(sizes) > MAX_REGIONS:
        raise TransferError(f"regions: {len(sizes)} of them, {MAX_REGIONS} at most")
    for size in sizes:
        if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < 2**63:
            raise TransferError(f"regions: {str(size)[:40]!r} is no size")
    return list(sizes)
