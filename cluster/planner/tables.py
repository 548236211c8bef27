"""Step times by interpolation between measured points; what every table of measurements becomes.

Decode: a grid of batch × context a sequence, bilinear, so that a batch's time is piecewise linear in its
context. Prefill: a piecewise linear function of the tokens (every matrix product sees only their number)
plus attention, which is linear in StepShape.prefill_context. A mixed step computes all its tokens as a
prefill does and reads the decoding sequences' KV besides. Beyond the points, the last piece goes on. Knows no
files.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from statistics import median
from typing import NamedTuple

from ...proto.errors import ConfigError
from ...router.step_time import Line, StepShape


class PrefillPoint(NamedTuple):
    """A measured prefill step, its fields as in StepShape."""

    tokens: int
    context: float
    seconds: float


class TableStepTime:
    """Measured step times of one worker without pipeline stages."""

    stages = 1

    def __init__(self, decode: Mapping[tuple[int, float], float], prefill: Iterable[PrefillPoint]) -> None:
        """
        Args:
            decode: (batch, context of each sequence) to seconds. Batches may lack their longest contexts.
            prefill: in any order.

        Raises:
            ConfigError: there are too few points to interpolate.
        """
        self._batches, self._contexts, self._grid = _monotone_grid(decode)
        self._tokens, self._tokens_s, self._per_prefill_context = _prefill_curve(list(prefill))
        self._curves: dict[int, tuple[list[float], list[float]]] = {}

    def stage_s(self, shape: StepShape) -> tuple[float, ...]:
        """See step_time.StepTime."""
        return (self.step_s(shape),)

    def step_s(self, shape: StepShape) -> float:
        """See step_time.StepTime."""
        tokens, prefill_context, batch, decode_context = shape
        if not tokens:
            line = self.decode_line(batch, decode_context)
            return line.intercept_s + line.slope_s * decode_context
        seconds = _on_curve(self._tokens, self._tokens_s, tokens + batch)
        seconds += self._per_prefill_context * prefill_context
        if batch:
            line = self.decode_line(batch, decode_context)
            without_kv = self.decode_line(batch, 0.0).intercept_s
            seconds += max(0.0, line.intercept_s + line.slope_s * decode_context - without_kv)
        return seconds

    def decode_line(self, batch: int, context: float) -> Line:
        """See step_time.StepTime."""
        contexts, seconds = self._curve(batch)
        right = min(max(bisect_right(contexts, context), 1), len(contexts) - 1)
        left = right - 1
        slope = (seconds[right] - seconds[left]) / (contexts[right] - contexts[left])
        # With float contexts close to a knot, right is the piece that starts there: `until` lies above.
        until = contexts[right] if right < len(contexts) - 1 else math.inf
        return Line(seconds[left] - slope * contexts[left], slope, until)

    def _curve(self, batch: int) -> tuple[list[float], list[float]]:
        """Knots of the batch's piecewise linear time: context of all its sequences, seconds."""
        curve = self._curves.get(batch)
        if curve is None:
            if batch < 1:
                raise ConfigError(f"a decode step of {batch} sequences was asked for; it has at least 1")
            curve = ([context * batch for context in self._contexts], self._seconds_of(batch))
            self._curves[batch] = curve
        return curve

    def _seconds_of(self, batch: int) -> list[float]:
        batches, grid = self._batches, self._grid
        right = min(max(bisect_right(batches, batch), 1), len(batches) - 1)
        weight = (batch - batches[right - 1]) / (batches[right] - batches[right - 1])
        seconds = [a + weight * (b - a) for a, b in zip(grid[right - 1], grid[right], strict=True)]
        # Beyond the last batch, or before the first, noise of the two that are prolonged must not let a
        # longer context be faster.
        return list(accumulate(seconds, max))


def _monotone_grid(
    decode: Mapping[tuple[int, float], float],
) -> tuple[list[int], list[float], list[list[float]]]:
    """(batches, contexts from 0 on, seconds by batch and context): full, never falling along either side.

    Of measurements that fall, the mean of the least surface above and the largest below that do not.
    """
    batches = sorted({batch for batch, _ in decode})
    contexts = sorted({context for _, context in decode})
    if len(batches) < 2 or len(contexts) < 2 or min(batches) < 1 or min(contexts) < 0:
        raise ConfigError("decode times need at least two batches from 1 on and two contexts to lie between")
    grid = [_filled([decode.get((batch, context)) for context in contexts], contexts) for batch in batches]
    upper = [list(row) for row in grid]
    for i, row in enumerate(upper):
        for j in range(len(row)):
            row[j] = max(row[j], row[j - 1] if j else 0.0, upper[i - 1][j] if i else 0.0)
    lower = [row[::-1] for row in grid[::-1]]
    for i, row in enumerate(lower):
        for j in range(len(row)):
            row[j] = min(row[j], row[j - 1] if j else math.inf, lower[i - 1][j] if i else math.inf)
    pairs = zip(upper, lower[::-1], strict=True)
    rising = [[(a + b) / 2.0 for a, b in zip(up, low[::-1], strict=True)] for up, low in pairs]
    if contexts[0] > 0.0:
        first, second = contexts[:2]
        empty = [max(0.0, row[0] - (row[1] - row[0]) / (second - first) * first) for row in rising]
        smallest = list(accumulate(reversed(empty), min))[::-1]
        contexts, rising = [0.0, *contexts], [[s, *row] for s, row in zip(smallest, rising, strict=True)]
    return batches, contexts, rising


def _filled(seconds: Sequence[float | None], contexts: Sequence[float]) -> list[float]:
    """What a batch lacks: between its points on their line, beyond them on the last one's, never falling."""
    known = [(context, s) for context, s in zip(contexts, seconds, strict=True) if s is not None]
    if len(known) < 2:
        raise ConfigError("decode times need at least two contexts for every batch")
    xs, ys = [context for context, _ in known], [s for _, s in known]
    return [_on_curve(xs, ys, context) for context in contexts]


def _on_curve(xs: Sequence[float], ys: Sequence[float], x: float) -> float:
    """Linear between the points; before the first its value; after the last as between the last two, but not
    falling."""
    if x <= xs[0]:
        return ys[0]
    if x >= xs[-1]:
        return ys[-1] + max(0.0, (ys[-1] - ys[-2]) / (xs[-1] - xs[-2])) * (x - xs[-1])
    right = bisect_right(xs, x)
    return ys[right - 1] + (ys[right] - ys[right - 1]) * (x - xs[right - 1]) / (xs[right] - xs[right - 1])


def _prefill_curve(points: list[PrefillPoint]) -> tuple[list[float], list[float], float]:
    """(numbers of tokens, seconds without attention for each, seconds a unit of prefill_context).

    The last from how steps of equally many tokens differ, by least squares on the relative error; the seconds
    without attention are each number's median, never falling with the tokens.
    """
    groups: dict[int, list[PrefillPoint]] = {}
    for point in points:
        groups.setdefault(point.tokens, []).append(point)
    if len(groups) < 2:
        raise ConfigError("prefill times need at least two numbers of tokens to lie between")
    moment = square = 0.0
    for group in groups.values():
        mean_context = sum(point.context for point in group) / len(group)
        mean_s = sum(point.seconds for point in group) / len(group)
        for point in group:
            spread = (point.context - mean_context) / mean_s
            moment += spread * (point.seconds - mean_s) / mean_s
            square += spread * spread
    per_context = max(0.0, moment / square) if square else 0.0
    # Attention may not cost more than a whole step took.
    per_context = min([per_context, *(p.seconds / p.context for p in points if p.context > 0.0)])
    tokens = sorted(groups)
    seconds = [median(p.seconds - per_context * p.context for p in groups[number]) for number in tokens]
    upper = accumulate(seconds, max)
    lower = list(accumulate(reversed(seconds), min))[::-1]
    rising = [(a + b) / 2.0 for a, b in zip(upper, lower, strict=True)]
    return [float(number) for number in tokens], rising, per_context
