"""How far a worker's recent steps are from what its latency model had predicted for them: the report that
says when predictions, and the plans made with them, have stopped being true. It changes no prediction."""

from __future__ import annotations

WEIGHT = 1.0 / 50.0
"""Of the newest step: the last fifty or so count."""
MOST = 1.0
"""A step that is further off than its prediction counts as one that is so far off: one stall is no drift."""


class StepDrift:
    """Exponentially weighted means over steps, of which the early ones count alike."""

    __slots__ = ("bias", "error", "num_steps")

    def __init__(self) -> None:
        self.error = 0.0
        """Mean of |measured / predicted - 1|."""
        self.bias = 0.0
        """Mean of measured / predicted - 1: above 0, steps take longer than predicted."""
        self.num_steps = 0

    def observe(self, predicted_s: float, measured_s: float) -> None:
        """One step, with the prediction made before the model knew it."""
        if predicted_s <= 0.0 or measured_s <= 0.0:
            return
        off = max(-MOST, min(MOST, measured_s / predicted_s - 1.0))
        self.num_steps += 1
        weight = max(WEIGHT, 1.0 / self.num_steps)
        self.error += weight * (abs(off) - self.error)
        self.bias += weight * (off - self.bias)
