"""A profile of an engine that follows the terms exactly, for tests."""

from __future__ import annotations

from diphase.cluster.planner.profile import EngineFacts, Profile, make_profile
from diphase.cluster.planner.profile_fit import StepCell
from diphase.router.latency_model import Coefficients
from diphase.router.step_time import StepShape

PREFILL = Coefficients(20e-3, 4e-4, 3e-7, 0.0, 0.0)
SMALL = Coefficients(21e-3, 0.0, 0.0, 2e-4, 6e-6)
LARGE = Coefficients(15e-3, 0.0, 0.0, 9e-4, 6e-6)
"""Crosses SMALL between 8 and 16 sequences."""
MIXED = Coefficients(24e-3, 4.5e-4, 3e-7, 8e-4, 6e-6)
BOUNDARY = 16

FACTS = EngineFacts(
    model="test",
    dtype="bf16",
    block_size=16,
    kv_cache_mib=512,
    threads=1,
    num_blocks=1000,
    block_bytes=16 * 23_040,
    num_layers=30,
    context_length=8192,
)


def true_s(shape: StepShape, boundary: int = BOUNDARY) -> float:
    if shape.prefill_tokens:
        terms = MIXED if shape.decode_batch else PREFILL
    else:
        terms = SMALL if shape.decode_batch < boundary else LARGE
    return float(sum(a * b for a, b in zip(terms, (1.0, *shape), strict=True)))


def shapes() -> list[StepShape]:
    found = [
        StepShape(prefill_tokens=n, prefill_context=n * (before + n / 2))
        for n in (16, 64, 128, 256, 512)
        for before in (0, 512, 2048)
    ]
    found += [
        StepShape(decode_batch=batch, decode_context=batch * context)
        for batch in (1, 2, 4, 8, 16, 32, 64)
        for context in (64, 256, 1024)
    ]
    found += [
        StepShape(n, n * (before + n / 2), batch, batch * (256 + before))
        for n in (64, 256, 512)
        for before in (0, 512)
        for batch in (2, 8, 32)
    ]
    return found


def cells(boundary: int = BOUNDARY, noise: tuple[float, ...] = (0.0,)) -> list[StepCell]:
    """`noise`: relative, of the runs of each cell."""
    return [
        StepCell(shape=shape, seconds=tuple(true_s(shape, boundary) * (1.0 + n) for n in noise))
        for shape in shapes()
    ]


def profile() -> Profile:
    return make_profile(FACTS, {"date": "today"}, cells())
