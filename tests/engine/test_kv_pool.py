from __future__ import annotations

import mmap
import os
from dataclasses import replace

import pytest
import torch
from diphase.engine import kv_pool
from diphase.engine.kv_pool import KvPool, available_bytes
from diphase.proto.errors import ConfigError
from diphase.proto.kv_layout import KvLayout

LAYOUT = KvLayout(model="m", num_layers=3, num_kv_heads=2, head_dim=8, block_size=16, dtype="bf16")


def test_the_tensor_lies_where_the_layout_says() -> None:
    pool = KvPool(LAYOUT, 5)
    assert pool.tensor.shape == (5, 3, 2, 2, 16, 8)
    pool.tensor[4, 1:] = 1.0
    offset, length = LAYOUT.run(4, 1, 2)
    one = torch.ones(1, dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()
    assert bytes(pool.buffer[offset : offset + length]) == one * (length // 2)
    assert not any(pool.buffer[:offset])
    assert len(pool.buffer) == offset + length
    pool.close()


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_every_dtype_of_the_layout_has_a_tensor(dtype: str) -> None:
    pool = KvPool(replace(LAYOUT, dtype=dtype), 2)
    assert pool.tensor.numel() * pool.tensor.element_size() == 2 * pool.layout.block_bytes
    pool.close()


def test_another_mapping_of_the_descriptor_sees_the_same_bytes() -> None:
    pool = KvPool(LAYOUT, 2)
    assert pool.fd is not None
    other = mmap.mmap(os.dup(pool.fd), 0)
    other[LAYOUT.block_bytes : LAYOUT.block_bytes + 2] = b"\x80\x3f"
    assert float(pool.tensor[1].flatten()[0]) == 1.0
    pool.close()
    other.close()


def test_closing_twice_is_closing_once_and_others_keep_their_view() -> None:
    pool = KvPool(LAYOUT, 2)
    view = pool.buffer[:4]
    descriptor = pool.fd
    assert descriptor is not None
    pool.close()
    pool.close()
    assert pool.fd is None
    assert bytes(view) == bytes(4)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_a_pool_without_blocks_says_what_to_change() -> None:
    with pytest.raises(ConfigError, match="raise engine"):
        KvPool(LAYOUT, 0)


def test_a_pool_beyond_the_available_memory_is_refused_before_any_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert available_bytes() > LAYOUT.block_bytes
    monkeypatch.setattr(kv_pool, "available_bytes", lambda: 2 * LAYOUT.block_bytes)
    KvPool(LAYOUT, 2).close()
    with pytest.raises(ConfigError, match="lower engine"):
        KvPool(LAYOUT, 3)
