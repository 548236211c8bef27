"""Weight-only int8 linear layers: int8 values, one bf16 scale an output row, bf16 activations.

Few rows run torch's _weight_int8pack_mm, which reads half the bytes of bf16 and costs in proportion to the
rows. From `_DEQUANTISE_FROM` rows on it is cheaper to widen the weight into a bf16 scratch and multiply that;
the scales are applied to the product, so that both ways round the same numbers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..proto.errors import KernelError
from .linear import Epilogue, apply_epilogue, check_linear

_DEQUANTISE_FROM = 13
"""Rows; the two ways took the same time between 12 and 14 rows for all shapes of the default model."""


def quantise(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric rounding to int8 by output row: values int8 [out, in] and scales bf16 [out]."""
    wide = weight.float()
    scales = (wide.abs().amax(dim=1).clamp_(min=1e-8) / 127.0).to(torch.bfloat16)
    values = (wide / scales.float().unsqueeze(1)).round_().clamp_(-127, 127)
    return values.to(torch.int8), scales


class Int8Linear:
    """Keeps the int8 weight; the widened one lives only during a call."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        if weight.dim() != 2 or not weight.is_floating_point():
            raise KernelError(
                f"int8 weights are made from a floating-point matrix, not {list(weight.shape)} {weight.dtype}"
            )
        self.out_features, self.in_features = weight.shape
        self._values, self._scales = quantise(weight)
        self._bias = bias

    def __call__(
        self, x: torch.Tensor, epilogue: Epilogue = Epilogue.NONE, other: torch.Tensor | None = None
    ) -> torch.Tensor:
        check_linear(x, self.in_features, torch.bfloat16)
        if x.shape[0] < _DEQUANTISE_FROM:
            y = torch.ops.aten._weight_int8pack_mm(x.contiguous(), self._values, self._scales)
        else:
            y = F.linear(x, self._values.to(torch.bfloat16)).mul_(self._scales)
        if self._bias is not None:
            y += self._bias
        return apply_epilogue(y, epilogue, other)

    def padded_rows(self, num_tokens: int, prompts: bool) -> int:
        return num_tokens
