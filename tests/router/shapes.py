"""Shapes of steps that tests feed to latency models."""

from __future__ import annotations

from diphase.router.step_time import StepShape


def prompt_shape(num_tokens: int, context_before: int = 0) -> StepShape:
    """Of computing `num_tokens` prompt tokens after `context_before` cached ones."""
    return StepShape(num_tokens, num_tokens * (context_before + num_tokens / 2))
