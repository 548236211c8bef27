"""Rotary positions (RoFormer, 2021), half-split layout: element i turns with element i + head_dim / 2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from ..proto.errors import KernelError


class Rope(Protocol):
    def __call__(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """Turns x [num_tokens, num_heads, head_dim] in place, computing in fp32. cos and sin are the rows of
        `rope_table` for the tokens' positions, [num_tokens, 1, head_dim] fp32.

        Raises:
            KernelError: shapes or dtypes do not fit.
        """
        ...


def rope_table(inv_freq: Sequence[float], num_positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and *signed* sin of every position, [num_positions, 1, head_dim] fp32 each: the first half of sin
    is negated, so that turning is x * cos + swap(x) * sin, where swap exchanges the halves.

    Args:
        inv_freq: radians a position, head_dim / 2 of them.
    """
    # As transformers does: frequencies and angles in fp32.
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), torch.tensor(inv_freq))
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=1).unsqueeze(1), torch.cat((-sin, sin), dim=1).unsqueeze(1)


def _check(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    if x.dim() != 3 or x.shape[2] % 2:
        raise KernelError(f"rope turns [num_tokens, num_heads, even head_dim]; got {list(x.shape)}")
    wanted = (x.shape[0], 1, x.shape[2])
    if cos.shape != wanted or sin.shape != wanted or cos.dtype != torch.float32 or sin.dtype != torch.float32:
        raise KernelError(
            f"rope takes cos and sin {list(wanted)} of fp32; got {list(cos.shape)} {cos.dtype} and "
            f"{list(sin.shape)} {sin.dtype}"
        )


def rope_reference(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Each pair turned by its angle."""
    _check(x, cos, sin)
    half = x.shape[2] // 2
    first, second = x[..., :half].float(), x[..., half:].float()
    c, s = cos[..., half:], sin[..., half:]
    x.copy_(torch.cat((first * c - second * s, second * c + first * s), dim=2))


def rope_cpu(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Five passes; a roll by half a head is the swap."""
    _check(x, cos, sin)
    wide = x.to(torch.float32, copy=True)
    swapped = torch.roll(wide, x.shape[2] // 2, 2)
    x.copy_(wide.mul_(cos).addcmul_(swapped, sin))
