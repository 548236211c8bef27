"""The codec that changes nothing: what the others are compared with. A staged push without a codec sends the
same bytes, gathered straight into its piece."""

from __future__ import annotations

import numpy as np

from ...proto.errors import TransferError
from .codec import RAW, KvSpec, check_sizes


class RawCodec:
    """Implements Codec. The payload is the KV, without a head; its length is all that can be wrong."""

    name = RAW
    lossless = True

    def max_bytes(self, spec: KvSpec) -> int:
        return spec.size_bytes

    def encode(self, kv: memoryview, spec: KvSpec, out: memoryview) -> int:
        check_sizes(kv, spec, out, spec.size_bytes)
        _copy(kv, out)
        return spec.size_bytes

    def decode(self, data: memoryview, spec: KvSpec, out: memoryview) -> None:
        if data.nbytes != spec.size_bytes:
            raise TransferError(f"the payload's length is {data.nbytes} where {spec.size_bytes} is expected")
        check_sizes(data, spec, out, spec.size_bytes)
        _copy(data, out)


def _copy(source: memoryview, target: memoryview) -> None:
    """Through numpy, which lets go of the interpreter lock."""
    np.copyto(np.frombuffer(target, np.uint8, source.nbytes), np.frombuffer(source, np.uint8))
