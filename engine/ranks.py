"""The seam of tensor parallelism: what a model asks of the ranks that compute it together.

A worker of one rank has `ALONE`, which adds nothing. Knows no processes and no sockets (rank_group.py).
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed

from ..kernels.linear import Epilogue, Linear
from ..proto.errors import WorkerLost
from .base import LayerHook

_dist: Any = torch.distributed
"""Half of what gloo needs is missing in its type stubs."""
_LOOPBACK = "127.0.0.1"
"""All ranks of a worker are on one machine."""


class Ranks(Protocol):
    def hooks(self, on_layer: LayerHook | None) -> tuple[LayerHook | None, LayerHook | None]:
        """`on_layer` as what is to be called when the layer's KV is in this rank's pool, and as what is to be
        called after the sum that follows attention: one of them, whichever is the first to say that the KV
        is there on all ranks."""
        ...

    def add(self, linear: Linear, x: torch.Tensor, residual: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """residual + the sum of linear(x) over the ranks, in the first `num_tokens` rows.

        Raises:
            WorkerLost: a rank is gone or hangs.
        """
        ...


class OneRank:
    """No others."""

    def hooks(self, on_layer: LayerHook | None) -> tuple[LayerHook | None, LayerHook | None]:
        return on_layer, None

    def add(self, linear: Linear, x: torch.Tensor, residual: torch.Tensor, num_tokens: int) -> torch.Tensor:
        return linear(x, Epilogue.ADD, residual)


ALONE: Ranks = OneRank()


class GlooRanks:
    """Ranks of one machine that sum over gloo: a group of their own, not torch.distributed's default one, so
    that a process may have several engines.

    A sum is a gather, added up in the order of the ranks by each of them: all ranks then have the same bits,
    and a row's do not depend on its company, as they would in gloo's all-reduce, which adds each part of a
    buffer in an order of its own. It is also one exchange instead of two.
    """

    def __init__(self, rank: int, size: int, *, store_path: str, timeout_s: float) -> None:
        """Waits until all ranks are here.

        Args:
            store_path: of a file where they find each other; the same for all, and nobody else's.
            timeout_s: longest that one waits for another, here and in every sum; seconds.

        Raises:
            WorkerLost: not all came in time.
        """
        self._rank = rank
        self._size = size
        options = _dist.ProcessGroupGloo._Options()
        options._timeout = timedelta(seconds=timeout_s)
        options._devices = [_dist.ProcessGroupGloo.create_device(hostname=_LOOPBACK)]
        try:
            self._group = _dist.ProcessGroupGloo(_dist.FileStore(store_path, size), rank, size, options)
        except RuntimeError as exc:
            raise WorkerLost(f"rank {rank} of {size} did not find the others: {exc}") from exc

    def hooks(self, on_layer: LayerHook | None) -> tuple[LayerHook | None, LayerHook | None]:
        # A rank's part of the sum is sent after its KV was written, and the sum needs the parts of all.
        return None, on_layer

    def add(self, linear: Linear, x: torch.Tensor, residual: torch.Tensor, num_tokens: int) -> torch.Tensor:
        result = linear(x, Epilogue.ADD, residual) if self._rank == 0 else linear(x)
        own = result[:num_tokens]
        parts = own.new_empty(self._size, *own.shape)
        try:
            self._group.allgather([list(parts)], [own]).wait()
        except RuntimeError as exc:
            raise WorkerLost(f"rank {self._rank} of this worker has lost another: {exc}") from exc
        torch.add(parts[0], parts[1], out=own)
        for part in parts[2:]:
            own.add_(part)
        return result
