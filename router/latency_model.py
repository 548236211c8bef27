"""How long a step takes: a linear model fitted online to the steps that workers report.

    step = base + per_prefill_token * T + per_prefill_context * C + per_sequence * B + per_decode_context * K

with T prompt tokens, C = sum of tokens * (context before + tokens / 2) over the prompt chunks, B decoding
sequences and K the sum of their contexts. A pure prefill step is base + b T + c C, a pure decode step base +
b K + c B: the shapes that DistServe (OSDI 2024, appendix A) and Splitwise fit; a mixed step shares one base.
Fitted by least squares on the *relative* error, so that short steps count as much as long ones and a single
stalled step little, with exponential forgetting and non-negative coefficients. Until samples speak, a weak
prior does.
"""

from __future__ import annotations

from typing import NamedTuple

from .step_time import Line, StepShape


class Coefficients(NamedTuple):
    """Seconds: of a step, a prompt token, a unit of prompt context, a sequence, a token of decode context. By
    themselves they are the step times of a worker of one stage (step_time.StepTime)."""

    base: float = 0.01
    per_prefill_token: float = 5e-4
    per_prefill_context: float = 1e-8
    per_sequence: float = 1e-3
    per_decode_context: float = 1e-6

    @property
    def stages(self) -> int:
        """See step_time.StepTime."""
        return 1

    def stage_s(self, shape: StepShape) -> tuple[float, ...]:
        """See step_time.StepTime."""
        return (self.step_s(shape),)

    def step_s(self, shape: StepShape) -> float:
        """See step_time.StepTime."""
        return (
            self.base
            + self.per_prefill_token * shape.prefill_tokens
            + self.per_prefill_context * shape.prefill_context
            + self.per_sequence * shape.decode_batch
            + self.per_decode_context * shape.decode_context
        )

    def decode_line(self, batch: int, context: float) -> Line:
        """See step_time.StepTime; one line for all contexts."""
        return Line(self.base + self.per_sequence * batch, self.per_decode_context, float("inf"))


DEFAULT_PRIOR = Coefficients()
PRIOR_WEIGHT = 1e-4
"""Weight of the prior's relative error against one sample's: it decides only what samples leave open."""
REFIT_EVERY = 8
"""Samples between two solutions of the normal equations, once there are as many."""
INFORMED_SAMPLES = 16
"""Steps after which predictions may turn requests away."""
SIZE = 5


class LatencyModel:
    """One worker's, or one pool's, step times; of a worker with pipeline stages, all together."""

    def __init__(self, prior: Coefficients = DEFAULT_PRIOR, memory: int = 500) -> None:
        """`memory`: a sample's weight falls to 1/e after so many further ones."""
        self._prior = prior
        self._theta = self._prior
        self._decay = 1.0 - 1.0 / memory
        self._gram = [[0.0] * SIZE for _ in range(SIZE)]  # decayed sum of x xᵀ / y²
        self._moment = [0.0] * SIZE  # decayed sum of x / y
        self._unfitted = 0
        self.num_samples = 0

    def observe(self, shape: StepShape, duration_s: float) -> None:
        """One reported step. Steps without work or time teach nothing."""
        if duration_s <= 0.0 or (shape.prefill_tokens == 0 and shape.decode_batch == 0):
            return
        scale = 1.0 / duration_s
        row = [
            scale,
            shape.prefill_tokens * scale,
            shape.prefill_context * scale,
            shape.decode_batch * scale,
            shape.decode_context * scale,
        ]
        decay = self._decay
        for i, (gram_row, x) in enumerate(zip(self._gram, row, strict=True)):
            for j in range(SIZE):
                gram_row[j] = gram_row[j] * decay + x * row[j]
            self._moment[i] = self._moment[i] * decay + x
        self.num_samples += 1
        self._unfitted += 1

    @property
    def informed(self) -> bool:
        """Whether enough was observed for a promise."""
        return self.num_samples >= INFORMED_SAMPLES

    @property
    def terms(self) -> Coefficients:
        """From a fit that may lack the last few samples."""
        if self._unfitted >= REFIT_EVERY or (self._unfitted and self.num_samples <= REFIT_EVERY):
            self._fit()
        return self._theta

    def step_s(self, shape: StepShape) -> float:
        """Predicted duration of one step, seconds."""
        return self.terms.step_s(shape)

    def _fit(self) -> None:
        """Non-negative least squares by an active set: negative coefficients become 0, the others are fitted
        anew."""
        self._unfitted = 0
        free = list(range(SIZE))
        theta = [0.0] * SIZE
        while free:
            solution = self._solve(free)
            negative = [i for i, value in zip(free, solution, strict=True) if value < 0.0]
            if not negative:
                for i, value in zip(free, solution, strict=True):
                    theta[i] = value
                break
            free = [i for i in free if i not in negative]
        self._theta = Coefficients(*theta)

    def _solve(self, free: list[int]) -> list[float]:
        """The normal equations of the free coefficients, each in units of its prior, by Gaussian
        elimination."""
        prior = self._prior
        rows = [
            [self._gram[i][j] * prior[i] * prior[j] + (PRIOR_WEIGHT if i == j else 0.0) for j in free]
            + [self._moment[i] * prior[i] + PRIOR_WEIGHT]
            for i in free
        ]
        n = len(free)
        for pivot in range(n):
            best = max(range(pivot, n), key=lambda r: abs(rows[r][pivot]))
            rows[pivot], rows[best] = rows[best], rows[pivot]
            for r in range(pivot + 1, n):
                factor = rows[r][pivot] / rows[pivot][pivot]
                if factor:
                    rows[r] = [a - factor * b for a, b in zip(rows[r], rows[pivot], strict=True)]
        solution = [0.0] * n
        for r in reversed(range(n)):
            rest = sum(rows[r][c] * solution[c] for c in range(r + 1, n))
            solution[r] = (rows[r][n] - rest) / rows[r][r]
        return [value * prior[i] for value, i in zip(solution, free, strict=True)]
