"""The memory of the KV pool: a memfd, so that another process of the host may map it, seen as one tensor.

Knows where bytes lie (proto/kv_layout.py) and nothing of who owns a block.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from pathlib import Path

import torch

from ..proto.errors import ConfigError
from ..proto.kv_layout import KvLayout

TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

_MADV_POPULATE_WRITE = 23
"""Linux 5.14 and later; the module mmap does not have it."""
_MEMINFO = Path("/proc/meminfo")
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_CGROUP_USED = Path("/sys/fs/cgroup/memory.current")


def available_bytes() -> int:
    """Memory that this process could still take: of the machine and, in a container, of its limit."""
    lines = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
    available = int(lines["MemAvailable"].split()[0]) << 10
    try:
        limit = _CGROUP_LIMIT.read_text().strip()
        used = int(_CGROUP_USED.read_text())
    except OSError:  # no cgroup, or the root one, which has no limit
        return available
    return available if limit == "max" else min(available, int(limit) - used)


class KvPool:
    """Owns the descriptor and the mapping. The pages are taken at once, so that no step stalls on first touch
    and a machine without the memory says so at start."""

    def __init__(self, layout: KvLayout, num_blocks: int) -> None:
        """
        Raises:
            ConfigError: not one block fits, or more than the memory that is available.
        """
        if num_blocks < 1:
            raise ConfigError(
                f"the KV pool has no room for one block of {layout.block_bytes} bytes; "
                "raise engine.kv_cache_mib"
            )
        self.layout = layout
        self.num_blocks = num_blocks
        size_bytes = num_blocks * layout.block_bytes
        # A memfd is never refused: without this check, taking the pages would end in the kernel's killer.
        if size_bytes > (available := available_bytes()):
            raise ConfigError(
                f"the KV pool of {size_bytes >> 20} MiB does not fit the {available >> 20} MiB of memory "
                "that are available; lower engine.kv_cache_mib"
            )
        self._fd: int | None = os.memfd_create("diphase-kv", os.MFD_CLOEXEC)
        os.ftruncate(self._fd, size_bytes)
        self._map = mmap.mmap(self._fd, size_bytes)
        with contextlib.suppress(OSError):  # a kernel without huge pages
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self.buffer = memoryview(self._map)
        # [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]
        self.tensor = torch.frombuffer(self._map, dtype=TORCH_DTYPES[layout.dtype]).view(
            num_blocks, layout.num_layers, 2, layout.num_kv_heads, layout.block_size, layout.head_dim
        )
        try:
            self._map.madvise(_MADV_POPULATE_WRITE)
        except OSError:  # an older kernel
            self.tensor.zero_()

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
        self.buffer = memoryview(b"")
        del self._map
