"""What a log of requests is like: its rate and burstiness, its lengths, the public trace that is nearest; and
workloads of any rate and size in its likeness.

Knows records and statistics; nothing of files' formats, of clusters or of what is simulated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...proto.errors import ConfigError
from ..load.trace_formats import TraceRecord
from ..load.traces import TRACES, load_trace
from ..load.workload import Arrivals, WorkloadConfig

Floats = NDArray[np.float64]

PERCENTILES = tuple(range(1, 100))
LEAST_CV = 0.01
"""Times more even than that count as even: a gamma distribution needs some variation, logarithms too."""
MOST_CV = 100.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthFit:
    """How one length is distributed over the requests."""

    mean: float
    """Tokens."""
    cv: float
    """Standard deviation over mean."""
    percentiles: tuple[float, ...]
    """Tokens at each of PERCENTILES."""

    def percentile(self, p: int) -> float:
        """Tokens; `p` from 1 to 99."""
        return self.percentiles[PERCENTILES.index(p)]


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrivalFit:
    """How requests are spread in time: a gamma process by the moments of its gaps."""

    rate: float
    """Requests a second, mean over the log."""
    cv: float
    """Coefficient of variation of the gaps; 1 is Poisson, more is burstier."""

    @property
    def gamma_shape(self) -> float:
        return 1.0 / max(self.cv, LEAST_CV) ** 2


@dataclass(frozen=True, slots=True, kw_only=True)
class LogFit:
    """What a log of requests is like."""

    num_requests: int
    arrivals: ArrivalFit | None
    """None where the log has no times, or all at one moment."""
    timed: bool
    """Whether it has times."""
    inputs: LengthFit
    outputs: LengthFit
    correlation: float
    """Of the logarithms of input and output; 0 where one of them never varies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Likeness:
    """How far a log is from another one, each part in natural logarithms: 0.69 is a factor of two."""

    inputs: float
    """Wasserstein-1 distance of the logarithms of the lengths, over PERCENTILES."""
    outputs: float
    arrivals: float | None
    """|ln| of the ratio of the gaps' coefficients of variation; None where one of them has no times. Rates
    play no part: a workload is scaled to any."""

    @property
    def distance(self) -> float:
        """Mean of the parts there are, so that a trace without times is neither favoured nor disfavoured."""
        parts = [self.inputs, self.outputs] + ([] if self.arrivals is None else [self.arrivals])
        return sum(parts) / len(parts)


def fit_log(records: Sequence[TraceRecord]) -> LogFit:
    """The fit of `records`, which are in order of time where they have times.

    Raises:
        ConfigError: there are fewer than two.
    """
    if len(records) < 2:
        raise ConfigError(f"a fit needs at least 2 requests, and the log has {len(records)}")
    inputs = np.array([record.input_tokens for record in records], dtype=np.float64)
    outputs = np.array([record.output_tokens for record in records], dtype=np.float64)
    return LogFit(
        num_requests=len(records),
        arrivals=_fit_arrivals(records),
        timed=records[0].arrival_s is not None,
        inputs=_fit_lengths(inputs),
        outputs=_fit_lengths(outputs),
        correlation=_correlation(np.log(inputs), np.log(outputs)),
    )


def likeness(one: LogFit, other: LogFit) -> Likeness:
    """The distance between two logs; symmetric, 0 for a log and itself."""
    arrivals = None
    if one.arrivals and other.arrivals:
        cvs = [min(max(fit.cv, LEAST_CV), MOST_CV) for fit in (one.arrivals, other.arrivals)]
        arrivals = abs(float(np.log(cvs[0] / cvs[1])))
    return Likeness(
        inputs=_wasserstein(one.inputs, other.inputs),
        outputs=_wasserstein(one.outputs, other.outputs),
        arrivals=arrivals,
    )


def public_fits(folder: Path) -> dict[str, LogFit]:
    """Fits of the public traces whose files lie in `folder`; the names that are lacking are those of TRACES
    that the result does not have.

    Raises:
        ConfigError: none of them is there; a file is malformed.
    """
    present = [name for name, trace in TRACES.items() if (folder / trace.path).is_file()]
    if not present:
        raise ConfigError(f"no public trace lies in {folder} to compare with; name their folder with --data")
    return {name: fit_log(load_trace(name, folder)) for name in present}


def nearest(fit: LogFit, fits: Mapping[str, LogFit]) -> list[tuple[str, Likeness]]:
    """The logs of `fits` with how far they are from `fit`, the nearest first; ties in order of name."""
    found = [(name, likeness(fit, other)) for name, other in fits.items()]
    return sorted(found, key=lambda item: (item[1].distance, item[0]))


def synthetic(
    fit: LogFit, records: Sequence[TraceRecord], *, num_requests: int, seed: int = 0
) -> tuple[WorkloadConfig, list[TraceRecord]]:
    """A workload in the likeness of the log, of any size and rate, as plan_arrivals() takes it: pairs of
    lengths drawn from the log's own (with replacement as soon as more are wanted than it has), arrivals as a
    gamma process with its variation.

    What it has not: shared prefixes and what follows from the order of requests (sessions, times of day).

    Args:
        records: those of which `fit` is the fit.

    Raises:
        ConfigError: the log has no times; a number is out of range.
    """
    if fit.arrivals is None:
        why = "all requests of the log arrive at one time, which does not say how their gaps vary"
        if not fit.timed:
            why = "the log has no times to take the variation of its arrivals from"
        raise ConfigError(f"{why}; use poisson or gamma arrivals")
    cv = min(max(fit.arrivals.cv, LEAST_CV), MOST_CV)
    config = WorkloadConfig(num_requests=num_requests, arrivals=Arrivals.GAMMA, cv=cv, seed=seed)
    return config, [replace(record, hash_ids=()) for record in records]


def sentence(fit: LogFit, near: Sequence[tuple[str, Likeness]] = ()) -> str:
    """The fit for people; `near` is what nearest() says."""
    arrivals = fit.arrivals
    when = " at one time" if fit.timed else " without times"
    if arrivals:
        when = f" at {arrivals.rate:.3g}/s, gaps vary by {arrivals.cv:.2f}"
    parts = [f"{fit.num_requests:,} requests{when}"]
    for name, lengths in (("prompts", fit.inputs), ("completions", fit.outputs)):
        marks = ", ".join(f"P{p} {lengths.percentile(p):,.0f}" for p in (50, 90, 99))
        parts.append(f"{name} {marks} tokens")
    if near:
        name, found = near[0]
        parts.append(f"nearest public trace {name}, off by a factor of {math.exp(found.distance):.2f}")
    return "; ".join(parts)


def _fit_arrivals(records: Sequence[TraceRecord]) -> ArrivalFit | None:
    times = [record.arrival_s for record in records if record.arrival_s is not None]
    if len(times) < len(records) or times[-1] <= times[0]:
        return None
    gaps = np.diff(np.array(times))
    return ArrivalFit(rate=1.0 / float(gaps.mean()), cv=float(gaps.std() / gaps.mean()))


def _fit_lengths(lengths: Floats) -> LengthFit:
    return LengthFit(
        mean=float(lengths.mean()),
        cv=float(lengths.std() / lengths.mean()),
        percentiles=tuple(np.percentile(lengths, PERCENTILES).tolist()),
    )


def _correlation(a: Floats, b: Floats) -> float:
    if np.ptp(a) == 0.0 or np.ptp(b) == 0.0:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def _wasserstein(one: LengthFit, other: LengthFit) -> float:
    return float(np.abs(np.log(one.percentiles) - np.log(other.percentiles)).mean())
