"""What to send and when, decided before the first request leaves: arrival times, lengths and prompts.

Pure: the same configuration, trace, model and rate give the same plan. Arrivals and lengths depend on the
seed alone, so that plans of different rates are one pattern stretched in time, and a comparison of two
systems sees equal requests; prompts depend on `salt` too, so that a later run finds nothing of an earlier
one in a cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from ...proto.errors import ConfigError
from .prompts import PromptSource
from .traces import HASH_BLOCK_TOKENS, TraceRecord

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

# One stream of chance for each purpose: adding draws to one never shifts another.
_ARRIVALS, _SELECTION = 1, 2


class Arrivals(StrEnum):
    """How requests are spread in time."""

    POISSON = "poisson"
    GAMMA = "gamma"
    TRACE = "trace"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadConfig:
    """One kind of load; a rate makes a plan of it."""

    num_requests: int = 200
    arrivals: Arrivals = Arrivals.POISSON
    cv: float = 1.0
    """Coefficient of variation of the inter-arrival times; for gamma arrivals. 1 is Poisson, more is
    burstier."""
    mean_input: int | None = None
    """Prompt tokens, mean over the plan; None keeps the trace's lengths, shrunk where the context needs
    it."""
    mean_output: int | None = None
    """Completion tokens, mean over the plan; given together with mean_input."""
    seed: int = 0
    text: bool = False
    """Prompts are words (about one token each) instead of token ids."""

    def __post_init__(self) -> None:
        if self.num_requests < 1:
            raise ConfigError(f"requests = {self.num_requests}; send at least 1")
        if not 0.0 < self.cv <= 100.0:
            raise ConfigError(f"cv = {self.cv} is out of range; use more than 0 and at most 100")
        if self.seed < 0:
            raise ConfigError(f"seed = {self.seed}; use 0 or more")
        if (self.mean_input is None) != (self.mean_output is None):
            raise ConfigError("give both means of the lengths, input and output, or none of them")
        for name, mean in (("mean input", self.mean_input), ("mean output", self.mean_output)):
            if mean is not None and mean < 1:
                raise ConfigError(f"{name} = {mean} tokens; use at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """What a plan must know of the model that is asked."""

    context_length: int
    """Tokens, prompt and completion together."""
    vocab_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRequest:
    """One request of a plan."""

    index: int
    arrival_s: float
    """When it is due, since the start of the run."""
    input_tokens: int
    """Of the prompt; an aim where the prompt is text."""
    output_tokens: int
    prompt: str | list[int]


def plan_load(
    config: WorkloadConfig,
    records: Sequence[TraceRecord],
    model: ModelShape,
    rate: float | None,
    salt: int = 0,
) -> list[PlannedRequest]:
    """The requests of one run, in order of arrival.

    Args:
        records: the trace; empty means fixed lengths, which are the configured means.
        rate: requests a second, mean over the plan; None keeps the times of the trace.

    Raises:
        ConfigError: the lengths cannot fit the model's context, or arrivals ask for what the trace lacks.
    """
    chosen = _select(config, records)
    inputs, outputs, factor = _lengths(config, chosen, model.context_length)
    arrivals = _arrivals(config, chosen, rate)
    prompts = PromptSource(
        vocab_size=model.vocab_size,
        seed=config.seed,
        salt=salt,
        block_tokens=max(1, round(HASH_BLOCK_TOKENS * factor)),
        text=config.text,
    )
    return [
        PlannedRequest(
            index=i,
            arrival_s=float(arrivals[i]),
            input_tokens=int(inputs[i]),
            output_tokens=int(outputs[i]),
            prompt=prompts.draw(i, int(inputs[i]), chosen[i].hash_ids if chosen else ()),
        )
        for i in range(config.num_requests)
    ]


def _select(config: WorkloadConfig, records: Sequence[TraceRecord]) -> list[TraceRecord]:
    """As many records as requests. Neighbours stay together where their order carries meaning (times, shared
    prefixes); else they are drawn from the whole trace."""
    count = config.num_requests
    if not records:
        return []
    rng = np.random.default_rng([config.seed, _SELECTION])
    if config.arrivals is Arrivals.TRACE or records[0].hash_ids:
        if count > len(records):
            raise ConfigError(
                f"the trace has {len(records)} requests; ask for at most that many, not {count}"
            )
        first = int(rng.integers(0, len(records) - count + 1))
        return list(records[first : first + count])
    picks = rng.choice(len(records), size=count, replace=count > len(records))
    return [records[i] for i in picks]


def _arrivals(config: WorkloadConfig, chosen: Sequence[TraceRecord], rate: float | None) -> Floats:
    """Seconds since the start; the first is 0 and the mean gap is 1 / rate exactly."""
    if rate is not None and not 0.0 < rate < float("inf"):
        raise ConfigError(f"rate = {rate} requests/s; use a number above 0")
    gaps_wanted = config.num_requests - 1
    if config.arrivals is Arrivals.TRACE:
        if not chosen:
            raise ConfigError("trace arrivals need a trace; name one, or use poisson or gamma arrivals")
        gaps = np.diff(np.array([record.arrival_s for record in chosen]))
        if rate is None:
            return np.concatenate(([0.0], np.cumsum(gaps)))
    elif rate is None:
        raise ConfigError(f"{config.arrivals} arrivals need a rate; only trace arrivals have their own")
    else:
        cv = 1.0 if config.arrivals is Arrivals.POISSON else config.cv
        rng = np.random.default_rng([config.seed, _ARRIVALS])
        # A gamma distribution of shape k has a coefficient of variation of 1 / sqrt(k); k = 1 is exponential.
        gaps = rng.gamma(1.0 / cv**2, size=gaps_wanted)
    if gaps_wanted and not gaps.sum() > 0.0:
        raise ConfigError("all requests of this part of the trace arrive at one time; ask for more of them")
    # Given how many arrive in a span of time, Poisson arrivals are uniform over it: fixing the mean gap
    # leaves the pattern what it was and makes the rate a fact instead of an expectation.
    scaled = gaps * (gaps_wanted / rate / gaps.sum()) if gaps_wanted else gaps
    return np.concatenate(([0.0], np.cumsum(scaled)))


def _lengths(
    config: WorkloadConfig, chosen: Sequence[TraceRecord], context_length: int
) -> tuple[Ints, Ints, float]:
    """(input tokens, output tokens, factor of the inputs)."""
    mean_input, mean_output = config.mean_input, config.mean_output
    if not chosen:
        if mean_input is None or mean_output is None:
            raise ConfigError("fixed lengths need the mean input and output tokens")
        if mean_input + mean_output > context_length:
            raise ConfigError(
                f"{mean_input} + {mean_output} tokens do not fit the model's context of {context_length}"
            )
        shape = config.num_requests
        return np.full(shape, mean_input), np.full(shape, mean_output), 1.0
    inputs = np.array([record.input_tokens for record in chosen], dtype=np.float64)
    outputs = np.array([record.output_tokens for record in chosen], dtype=np.float64)
    if mean_input is None or mean_output is None:
        # One factor for all, so that the longest fits and the shape stays.
        factor = min(1.0, context_length / float((inputs + outputs).max()))
        scaled_outputs = _scaled(outputs, factor, np.full(len(chosen), context_length - 1.0))
        return _scaled(inputs, factor, context_length - scaled_outputs), scaled_outputs, factor
    # The completion may take half of the context, the prompt what its own completion leaves.
    scaled_outputs, _ = fit_mean(outputs, mean_output, np.full(len(chosen), context_length // 2))
    scaled_inputs, factor = fit_mean(inputs, mean_input, context_length - scaled_outputs)
    return scaled_inputs, scaled_outputs, factor


def _scaled(lengths: Floats, factor: float, caps: Floats | Ints) -> Ints:
    return np.clip(np.rint(lengths * factor), 1, caps).astype(np.int64)


def fit_mean(lengths: Floats, mean: float, caps: Floats | Ints) -> tuple[Ints, float]:
    """`lengths` times the one factor that gives them `mean` after rounding and capping, and the factor.

    Raises:
        ConfigError: even all lengths at their caps have a smaller mean.
    """
    if mean > float(caps.mean()):
        raise ConfigError(
            f"a mean of {mean:g} tokens cannot fit: the model's context allows {float(caps.mean()):.0f}"
        )
    low, high = 0.0, 1.0
    longest = np.maximum(lengths, 1.0)
    while _scaled(longest, high, caps).mean() < mean:
        high *= 2.0
    for _ in range(50):
        middle = (low + high) / 2.0
        if _scaled(longest, middle, caps).mean() < mean:
            low = middle
        else:
            high = middle
    return _scaled(longest, high, caps), high
