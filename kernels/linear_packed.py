"""bf16 linear layers whose weight is packed for oneDNN once instead of at every call.

F.linear on a plain bf16 weight repacks all of it at each call, which at decode's few rows takes longer than
the product (benchmarks/engine.py's model: 33 against 18 ms a step on one AMX core). The operators are those
that torch.compile itself emits for frozen weights; the epilogue runs on the fp32 accumulators, before the one
rounding.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from ..proto.errors import KernelError
from .linear import Epilogue, check_linear

_PACK_ROWS = 16
"""Rows that the packing is told to expect: all of 1 to 1,024 gave the same layout."""
_MIN_SMALL = 2
"""Without AMX a single row was summed in another order than the same row among others."""
_MAX_SMALL = 32
_MIN_LARGE = 48
_MAX_LARGE = 512
"""A row's bits were the same at 1 to 32 rows, and again at 37 to 512, for every shape of the default model's
layers with AMX: beyond each bound oneDNN sums in another order."""
_ATTRIBUTE = {
    Epilogue.NONE: "none",
    Epilogue.SILU: "swish",
    Epilogue.MUL: "mul",
    Epilogue.ADD: "add",
}


@cache
def _operators() -> Any | None:
    """torch.ops.mkldnn, where oneDNN multiplies bf16 on this processor."""
    ops = torch.ops.mkldnn
    if not torch.backends.mkldnn.is_available() or not hasattr(ops, "_linear_pointwise"):
        return None
    return ops if ops._is_mkldnn_bf16_supported() else None


def can_pack(weight: torch.Tensor) -> bool:
    """Whether PackedLinear takes this weight on this machine."""
    return weight.dtype is torch.bfloat16 and weight.device.type == "cpu" and _operators() is not None


def padded_rows(num_tokens: int, prompts: bool) -> int:
    """Row counts that are few, so that oneDNN's compiled kernels are reused (a new one takes milliseconds),
    and that keep a row's bits apart from its company: steps that only decode stay on the small side of the
    bounds above as long as they fit, steps with prompts always on the large one."""
    if num_tokens <= _MAX_SMALL and not prompts:
        return max(_MIN_SMALL, num_tokens) if num_tokens <= 8 else -(-num_tokens // 8) * 8
    step = 16 if num_tokens <= 128 else 32 if num_tokens <= _MAX_LARGE else 64
    return max(_MIN_LARGE, -(-num_tokens // step) * step)


class PackedLinear:
    """Keeps only the packed weight."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        ops = _operators()
        if ops is None or not can_pack(weight):
            raise KernelError(f"oneDNN cannot pack a weight of {weight.dtype} on this machine")
        self.out_features, self.in_features = weight.shape
        self._packed = ops._reorder_linear_weight(weight.contiguous(), _PACK_ROWS)
        self._bias = bias
        self._unary = ops._linear_pointwise.default
        self._binary = ops._linear_pointwise.binary

    def __call__(
        self, x: torch.Tensor, epilogue: Epilogue = Epilogue.NONE, other: torch.Tensor | None = None
    ) -> torch.Tensor:
        check_linear(x, self.in_features, torch.bfloat16)
        if other is None and epilogue in {Epilogue.MUL, Epilogue.ADD}:
            raise KernelError(f"epilogue {epilogue} needs `other`")
        if other is not None and other.shape != (x.shape[0], self.out_features):
            raise KernelError(f"`other` must be {[x.shape[0], self.out_features]}, not {list(other.shape)}")
        if x.shape[0] <= _MAX_LARGE:
            return self._product(x, epilogue, other)
        y = x.new_empty(x.shape[0], self.out_features)
        for begin in range(0, x.shape[0], _MAX_LARGE):
            rows = slice(begin, begin + _MAX_LARGE)
            y[rows] = self._product(x[rows], epilogue, None if other is None else other[rows])
        return y

    def padded_rows(self, num_tokens: int, prompts: bool) -> int:
        return padded_rows(num_tokens, prompts)

    def _product(self, x: torch.Tensor, epilogue: Epilogue, other: torch.Tensor | None) -> torch.Tensor:
        y: torch.Tensor
        if epilogue is Epilogue.NONE or epilogue is Epilogue.SILU:
            y = self._unary(x, self._packed, self._bias, _ATTRIBUTE[epilogue], [], "")
        else:
            y = self._binary(x, other, self._packed, self._bias, _ATTRIBUTE[epilogue])
        return y
