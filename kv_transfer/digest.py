"""Digests of KV bytes: xxh3_64 runs at memory speed (sha256 costs fifty times as much) and finds what a
transport may do wrong; it is no protection against an adversary, which the cluster token keeps out."""

from __future__ import annotations

import numpy as np
import xxhash
from numpy.typing import NDArray


def digest_runs(buffer: memoryview, runs: NDArray[np.int64]) -> list[int]:
    """xxh3_64 of each run ([n, 2]: offset, length) of `buffer`."""
    return [xxhash.xxh3_64_intdigest(buffer[begin : begin + length]) for begin, length in runs.tolist()]
