"""y = x Wᵀ + b with an epilogue: the contract of every linear layer and its plain torch reference.

A linear layer is an object, because its weight may be kept in a form of its own (packed, quantised); it is
built once from the plain weight, which it does not keep beside it.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Protocol

import torch
import torch.nn.functional as F

from ..proto.errors import KernelError


class Epilogue(StrEnum):
    """What follows the product, elementwise. `other` is [num_tokens, out_features]."""

    NONE = "none"
    SILU = "silu"
    """silu(y)"""
    MUL = "mul"
    """y * other"""
    ADD = "add"
    """y + other"""


class Linear(Protocol):
    in_features: int
    out_features: int

    def __call__(
        self, x: torch.Tensor, epilogue: Epilogue = Epilogue.NONE, other: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x [num_tokens, in_features] -> [num_tokens, out_features], same dtype.

        Raises:
            KernelError: x or other has another width or dtype, or other is missing.
        """
        ...

    def padded_rows(self, num_tokens: int, prompts: bool) -> int:
        """How many rows (at least num_tokens) the layer is best given; the further ones are ignored.

        `prompts`: whether the step computes prompts, not only one token a sequence."""
        ...


class MakeLinear(Protocol):
    def __call__(
        self, weight: torch.Tensor, bias: torch.Tensor | None = None, *, quantised: bool = False
    ) -> Linear:
        """A layer of weight [out_features, in_features] and bias [out_features]; `quantised` asks for int8
        weights."""
        ...


def apply_epilogue(y: torch.Tensor, epilogue: Epilogue, other: torch.Tensor | None) -> torch.Tensor:
    """The epilogue as separate operations, in place where that is possible."""
    if epilogue is Epilogue.NONE:
        return y
    if epilogue is Epilogue.SILU:
        return F.silu(y, inplace=True)
    if other is None:
        raise KernelError(f"epilogue {epilogue} needs `other`")
    return y.mul_(other) if epilogue is Epilogue.MUL else y.add_(other)


def check_linear(x: torch.Tensor, in_features: int, dtype: torch.dtype) -> None:
    """Raises:
    KernelError: x is not [num_tokens, in_features] of that dtype on the CPU."""
    if x.dim() != 2 or x.shape[1] != in_features or x.dtype != dtype or x.device.type != "cpu":
        raise KernelError(
            f"linear takes a CPU tensor [num_tokens, {in_features}] of {dtype}; "
            f"got {list(x.shape)} of {x.dtype} on {x.device}"
        )


class DenseLinear:
    """The reference, and the path of fp32: F.linear and the epilogue after it."""

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None = None, *, quantised: bool = False
    ) -> None:
        if quantised:
            raise KernelError("the dense linear layer has no int8 weights; use the kernels of the device")
        self.out_features, self.in_features = weight.shape
        self._weight = weight
        self._bias = bias

    def __call__(
        self, x: torch.Tensor, epilogue: Epilogue = Epilogue.NONE, other: torch.Tensor | None = None
    ) -> torch.Tensor:
        check_linear(x, self.in_features, self._weight.dtype)
        return apply_epilogue(F.linear(x, self._weight, self._bias), epilogue, other)

    def padded_rows(self, num_tokens: int, prompts: bool) -> int:
        return num_tokens
