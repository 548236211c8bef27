"""RMSNorm (Zhang and Sennrich, 2019): x / sqrt(mean(x²) + eps) * weight, each token by itself."""

from __future__ import annotations

from functools import cache
from typing import Protocol

import torch

from ..proto.errors import KernelError

_FEW_ROWS = 32


class RmsNorm(Protocol):
    def __call__(self, out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
        """out, x [num_tokens, hidden_size]; weight [hidden_size]; all of one dtype. The mean and the division
        are in fp32, the product with the weight in the tensors' dtype (as transformers computes it).

        Raises:
            KernelError: shapes or dtypes do not fit.
        """
        ...


def _check(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
    if x.dim() != 2 or out.shape != x.shape or weight.shape != x.shape[1:]:
        raise KernelError(
            f"rms_norm takes out and x [num_tokens, hidden] and weight [hidden]; "
            f"got {list(out.shape)}, {list(x.shape)} and {list(weight.shape)}"
        )
    if not x.dtype == out.dtype == weight.dtype:
        raise KernelError(f"rms_norm takes one dtype; got {out.dtype}, {x.dtype} and {weight.dtype}")


def rms_norm_reference(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
    """As the formula is written."""
    _check(out, x, weight)
    wide = x.float()
    normed = wide / torch.sqrt(wide.pow(2).mean(dim=1, keepdim=True) + eps)
    out.copy_(normed.to(x.dtype) * weight)


@cache
def _constant(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float32)


def rms_norm_cpu(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
    """Half the time of F.rms_norm. A row's bits do not depend on the number of rows: both ways below round
    alike; the first has fewer operators, the second passes that vectorise better."""
    _check(out, x, weight)
    wide = x if len(x) <= _FEW_ROWS else x.to(torch.float32, copy=True)
    norm = torch.linalg.vector_norm(wide, 2, 1, True, dtype=torch.float32)  # [num_tokens, 1]
    scale = torch.addcmul(_constant(eps), norm, norm, value=1.0 / x.shape[1]).rsqrt_()
    if wide is x:
        torch.mul(x, scale, out=out)
    else:
        out.copy_(wide.mul_(scale))
    out.mul_(weight)
