"""The memory of the KV pool: a memfd, so that another process of the host may map it, seen as one tensor.

Knows where bytes lie (proto/kv_layout.py) and nothing of who owns a block.
"""

from __future__ import annotations

import mmap
import os

import torch

from ..proto.errors import ConfigError
from ..proto.kv_layout import KvLayout

TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class KvPool:
    """Owns the descriptor and the mapping. The pages are taken at once, so that no step stalls on first touch
    and a machine without the memory says so at start."""

    def __init__(self, layout: KvLayout, num_blocks: int) -> None:
        """
        Raises:
            ConfigError: not one block fits, or the machine does not have the memory.
        """
        if num_blocks < 1:
            raise ConfigError(
                f"the KV pool has no room for one block of {layout.block_bytes} bytes; "
                "raise engine.kv_cache_mib"
            )
        self.layout = layout
        self.num_blocks = num_blocks
        size_bytes = num_blocks * layout.block_bytes
        self._fd: int | None = os.memfd_create("diphase-kv", os.MFD_CLOEXEC)
        try:
            os.posix_fallocate(self._fd, 0, size_bytes)
            self._map = mmap.mmap(self._fd, size_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        except OSError as error:
            os.close(self._fd)
            raise ConfigError(
                f"the machine has no {size_bytes >> 20} MiB for the KV pool ({error.strerror}); "
                "lower engine.kv_cache_mib"
            ) from error
        self.buffer = memoryview(self._map)
        # [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]
        self.tensor = torch.frombuffer(self._map, dtype=TORCH_DTYPES[layout.dtype]).view(
            num_blocks, layout.num_layers, 2, layout.num_kv_heads, layout.block_size, layout.head_dim
        )

    @property
    def fd(self) -> int | None:
        """The memfd; None once closed."""
        return self._fd

    def close(self) -> None:
        """Closes the descriptor and lets go of the memory, which ends with the last view of it that others
        still hold. Idempotent."""
        if self._fd is None:
            return
        os.close(self._fd)
        self._fd = None
        self.tensor = torch.empty(0)
