"""The content hash of KV blocks, the same in engine, router and hand-off.

Hash of block i = xxh3_128(hash of block i-1, token ids of block i). The chain makes a block's hash name the
whole prefix up to its end; the first link is the hash of a seed that names model and layout, so that caches
of different models never meet.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import xxhash

HASH_BYTES = 16


def root_hash(seed: str) -> bytes:
    """What block 0 is chained to; `seed` names the model and its KV layout."""
    return xxhash.xxh3_128_digest(seed.encode())


def block_hashes(token_ids: Sequence[int], block_size: int, root: bytes) -> list[bytes]:
    """Hashes of the full blocks of `token_ids`, 16 bytes each; the rest of the tokens has none."""
    return extend_hashes([], token_ids, block_size, root)


def extend_hashes(known: list[bytes], token_ids: Sequence[int], block_size: int, root: bytes) -> list[bytes]:
    """`known` (hashes of the leading blocks) with those of the further full blocks appended."""
    num_full = len(token_ids) // block_size
    hashes = list(known)
    previous = hashes[-1] if hashes else root
    for i in range(len(hashes), num_full):
        ids = array("I", token_ids[i * block_size : (i + 1) * block_size])
        previous = xxhash.xxh3_128_digest(previous + ids.tobytes())
        hashes.append(previous)
    return hashes
