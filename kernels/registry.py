"""Which implementation of each operation runs on which device: the one place that knows.

An operation is one file with its contract, its checks and a plain torch reference; a faster path is a further
file and one entry here. Implementations are named as strings and imported on use, so that a path whose
library is absent costs nothing. Knows no models and no requests.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, TypeVar

import torch

from ..proto.errors import KernelError
from .kv_gather import KvGather, KvScatter
from .kv_write import KvWrite
from .linear import DenseLinear, Linear, MakeLinear
from .paged_attention import MakePagedAttention
from .rms_norm import RmsNorm
from .rope import Rope


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """One implementation of every operation of a model."""

    linear: MakeLinear
    rms_norm: RmsNorm
    rope: Rope
    kv_write: KvWrite
    paged_attention: MakePagedAttention


@dataclass(frozen=True, slots=True, kw_only=True)
class KvCopies:
    """One implementation of every operation of a hand-off."""

    kv_gather: KvGather
    kv_scatter: KvScatter


T = TypeVar("T", Kernels, KvCopies)

_IMPLEMENTATIONS: dict[str, dict[str, str]] = {
    "reference": {
        "linear": "linear:DenseLinear",
        "rms_norm": "rms_norm:rms_norm_reference",
        "rope": "rope:rope_reference",
        "kv_write": "kv_write:kv_write_reference",
        "paged_attention": "paged_attention:ReferencePagedAttention",
        "kv_gather": "kv_gather:kv_gather_reference",
        "kv_scatter": "kv_gather:kv_scatter_reference",
    },
    "cpu": {
        "linear": "registry:_cpu_linear",
        "rms_norm": "rms_norm:rms_norm_cpu",
        "rope": "rope:rope_cpu",
        "kv_write": "kv_write:kv_write_cpu",
        "paged_attention": "paged_attention_cpu:CpuPagedAttention",
        "kv_gather": "kv_gather:kv_gather_cpu",
        "kv_scatter": "kv_gather:kv_scatter_cpu",
    },
    "cuda": {
        "kv_gather": "kv_gather_triton:kv_gather_triton",
        "kv_scatter": "kv_gather_triton:kv_scatter_triton",
    },
}
"""Device -> operation -> "module:name" in this folder. `reference` is slow and runs anywhere."""


@cache
def kernels_for(device: str) -> Kernels:
    """The implementations of a model's operations for a device type, or those of `reference`.

    Raises:
        KernelError: there are none for that device, or they need a package that is not installed.
    """
    return _chosen(Kernels, device)


@cache
def kv_copies_for(device: str) -> KvCopies:
    """As kernels_for, of a hand-off's operations."""
    return _chosen(KvCopies, device)


def _chosen(operations: type[T], device: str) -> T:
    names = [field.name for field in fields(operations)]
    chosen = _IMPLEMENTATIONS.get(device, {})
    if not chosen.keys() >= set(names):
        complete = [name for name, there in _IMPLEMENTATIONS.items() if there.keys() >= set(names)]
        raise KernelError(
            f"no kernels for device {device!r} ({', '.join(names)}); there are {', '.join(complete)}"
        )
    try:
        return operations(**{name: _load(chosen[name]) for name in names})
    except ModuleNotFoundError as error:
        raise KernelError(
            f"the kernels for device {device!r} need {error.name}, which is not installed; "
            f"pip install 'diphase[{device}]'"
        ) from error


def _load(path: str) -> Any:
    module, name = path.split(":")
    return getattr(importlib.import_module(f".{module}", __package__), name)


def _cpu_linear(weight: torch.Tensor, bias: torch.Tensor | None = None, *, quantised: bool = False) -> Linear:
    """int8 where asked for; bf16 packed once where oneDNN multiplies bf16; F.linear otherwise."""
    if quantised:
        from .linear_int8 import Int8Linear

        return Int8Linear(weight, bias)
    from .linear_packed import PackedLinear, can_pack

    if can_pack(weight):
        return PackedLinear(weight, bias)
    return DenseLinear(weight, bias)
