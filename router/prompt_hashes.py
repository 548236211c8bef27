"""The block hashes of one prompt, as the workers' prefix caches know them."""

from __future__ import annotations

from collections.abc import Sequence

from ..proto.block_hash import block_hashes, root_hash
from .worker_handle import WorkerHandle


class PromptHashes:
    """Block hashes of one prompt, computed once for each KV layout that a worker has."""

    __slots__ = ("_by_layout", "_roots", "_token_ids")

    def __init__(self, token_ids: Sequence[int], roots: dict[str, bytes]) -> None:
        """`roots` keeps the root hash of each layout from one prompt to the next."""
        self._token_ids = token_ids
        self._roots = roots
        self._by_layout: dict[str, list[bytes]] = {}

    def __call__(self, worker: WorkerHandle) -> list[bytes]:
        layout = worker.layout_hash
        hashes = self._by_layout.get(layout)
        if hashes is None:
            root = self._roots.get(layout)
            if root is None:
                root = self._roots[layout] = root_hash(layout)
            hashes = self._by_layout[layout] = block_hashes(self._token_ids, worker.block_size, root)
        return hashes
