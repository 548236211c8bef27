from __future__ import annotations

import math

import pytest
import torch
from diphase.kernels.rope import Rope, rope_cpu, rope_reference, rope_table
from diphase.proto.errors import KernelError


def inv_freq(head_dim: int) -> list[float]:
    return [10000.0 ** (-2.0 * i / head_dim) for i in range(head_dim // 2)]


@pytest.mark.parametrize("head_dim", [2, 64, 80])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_cpu_path_equals_the_reference(head_dim: int, dtype: torch.dtype) -> None:
    cos, sin = rope_table(inv_freq(head_dim), 100)
    positions = torch.tensor([0, 1, 99, 42])
    x = torch.randn(4, 3, head_dim, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected, result = x.clone(), x.clone()
    rope_reference(expected, cos[positions], sin[positions])
    rope_cpu(result, cos[positions], sin[positions])
    torch.testing.assert_close(result, expected, atol=1e-6, rtol=1e-2 if dtype is torch.bfloat16 else 1e-5)
    assert torch.equal(result[0], x[0])  # position 0 turns nothing


def test_a_pair_turns_by_its_frequency_times_the_position() -> None:
    cos, sin = rope_table(inv_freq(4), 8)
    x = torch.tensor([[[1.0, 0.0, 0.0, 2.0]]])  # pairs (1, 0) and (0, 2)
    rope_cpu(x, cos[5:6], sin[5:6])
    slow = 5 * inv_freq(4)[1]
    expected = [math.cos(5.0), -2.0 * math.sin(slow), math.sin(5.0), 2.0 * math.cos(slow)]
    torch.testing.assert_close(x.flatten(), torch.tensor(expected), atol=1e-5, rtol=0.0)


def test_a_strided_view_is_turned_in_place() -> None:
    cos, sin = rope_table(inv_freq(8), 4)
    rows = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    kept = rows.clone()
    expected = rows[:, :2].clone()
    rope_reference(expected, cos[1:4], sin[1:4])
    rope_cpu(rows[:, :2], cos[1:4], sin[1:4])
    torch.testing.assert_close(rows[:, :2], expected)
    assert torch.equal(rows[:, 2:], kept[:, 2:])


@pytest.mark.parametrize("rope", [rope_cpu, rope_reference])
def test_wrong_shapes_and_dtypes_are_refused(rope: Rope) -> None:
    cos, sin = rope_table(inv_freq(8), 4)
    for x, c, s in (
        (torch.zeros(3, 2, 8), cos, sin),
        (torch.zeros(4, 2, 7), cos, sin),
        (torch.zeros(4, 8), cos, sin),
        (torch.zeros(4, 2, 8), cos.bfloat16(), sin),
    ):
        with pytest.raises(KernelError):
            rope(x, c, s)
