"""How long a step will take, learned from the steps so far: what tells a long step from a hung worker.

A Kalman filter whose state, what each part of a step costs, wanders slowly (Bar-Shalom, Estimation with
Applications to Tracking and Navigation, chapter 5). It judges only this worker's liveness; placement uses
the router's latency model.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..proto.worker_pb2 import StepSample
from .base import StepPlan

NOISE_S2 = 1e-4
"""Variance of a step's time around its prediction: ten milliseconds, squared."""
WANDER_S2 = 1e-8
"""Variance that each step adds to what is known of the costs: the last hundred steps or so count."""
_SCALES = np.array([1.0, 1e-3, 1e-6, 1e-1, 1e-4])
"""Bring the features near 1: constant, prompt tokens, prompt context, batch, batch context."""


def describe(plan: StepPlan) -> StepSample:
    """The plan in the latency model's terms; time not filled in. Call before the plan's sequences change."""
    sample = StepSample()
    prefill_context = 0.0
    for chunk in plan.chunks:
        before, n = chunk.sequence.num_computed, chunk.num_tokens
        if n > 1:
            sample.prefill_tokens += n
            prefill_context += n * (before + n / 2)
        else:
            sample.decode_batch += 1
            sample.decode_context += before + 1
    sample.prefill_context = round(prefill_context)
    return sample


class StepPredictor:
    """Predicts seconds from samples without time, and learns from samples with it."""

    def __init__(self) -> None:
        self._weights = np.zeros(len(_SCALES))
        self._covariance = np.eye(len(_SCALES))

    def predict(self, sample: StepSample) -> float:
        """Seconds; 0 while nothing is known."""
        return max(0.0, float(self._weights @ self._features(sample)))

    def observe(self, sample: StepSample) -> None:
        x = self._features(sample)
        px = self._covariance @ x
        gain = px / (NOISE_S2 + x @ px)
        self._weights += gain * (sample.duration_s - self._weights @ x)
        self._covariance += WANDER_S2 * np.eye(len(x)) - np.outer(gain, px)

    @staticmethod
    def _features(sample: StepSample) -> NDArray[np.float64]:
        raw = (1, sample.prefill_tokens, sample.prefill_context, sample.decode_batch, sample.decode_context)
        features: NDArray[np.float64] = np.multiply(raw, _SCALES)
        return features
