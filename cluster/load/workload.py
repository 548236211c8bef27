"""What to send and when, decided before the first request leaves: arrival times, lengths and prompts.

Pure: the same configuration, trace, model and rate give the same plan. Arrivals and lengths depend on the
seed alone, so that plans of different rates are one pattern stretched in time, and a comparison of two
systems, or of a system and its simulation, sees equal requests; prompts depend on `salt` too, so that a later
run finds nothing of an earlier one in a cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from ...proto.errors import ConfigError
from .prompts import PromptSource
from .trace_formats import HASH_BLOCK_TOKENS, TraceRecord

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

# One stream of chance for each purpose: adding draws to one never shifts another.
_ARRIVALS, _SELECTION = 1, 2
_NO_LIMIT = 2**60
"""Tokens, far beyond any sum of lengths."""


class Arrivals(StrEnum):
    """How requests are spread in time."""

    POISSON = "poisson"
    GAMMA = "gamma"
    TRACE = "trace"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadConfig:
    """One kind of load; a rate makes a plan of it."""

    num_requests: int | None = 200
    """None: the whole trace, from its start."""
    arrivals: Arrivals = Arrivals.POISSON
    cv: float = 1.0
    """Coefficient of variation of the inter-arrival times; for gamma arrivals. 1 is Poisson, more is
    burstier."""
    mean_input: int | None = None
    """Prompt tokens, mean over the plan; None keeps the trace's lengths, shrunk where the context needs
    it."""
    mean_output: int | None = None
    """Completion tokens, mean over the plan; given together with mean_input."""
    speedup: float = 1.0
    """What a trace's own times are divided by, where no rate is given."""
    seed: int = 0
    text: bool = False
    """Prompts are words (about one token each) instead of token ids."""

    def __post_init__(self) -> None:
        if self.num_requests is not None and self.num_requests < 1:
            raise ConfigError(f"requests = {self.num_requests}; send at least 1")
        if not 0.01 <= self.cv <= 100.0:
            raise ConfigError(f"cv = {self.cv} is out of range; use 0.01 to 100")
        if not 0.0 < self.speedup < float("inf"):
            raise ConfigError(f"speedup = {self.speedup}; use a number above 0")
        if self.speedup != 1.0 and self.arrivals is not Arrivals.TRACE:
            raise ConfigError(
                f"speedup = {self.speedup} is for trace arrivals, not {self.arrivals}; give a rate"
            )
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
class Arrival:
    """One request as a simulation sees it: when, how long, and what it shares."""

    arrival_s: float
    """When it is due, since the start of the run."""
    input_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...]
    """Names of the prompt's blocks, equal ids meaning an equal prefix; empty where the trace has none."""
    hash_block_tokens: int
    """Prompt tokens that one hash id stands for, at the scale of the plan."""


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
    """The requests of one run, in order of arrival: those of `plan_arrivals`, with prompts.

    Raises:
        ConfigError: the lengths cannot fit the model's context, or arrivals ask for what the trace lacks.
    """
    arrivals = plan_arrivals(config, records, model.context_length, rate)
    prompts = PromptSource(
        vocab_size=model.vocab_size,
        seed=config.seed,
        salt=salt,
        block_tokens=arrivals[0].hash_block_tokens,
        text=config.text,
    )
    return [
        PlannedRequest(
            index=i,
            arrival_s=arrival.arrival_s,
            input_tokens=arrival.input_tokens,
            output_tokens=arrival.output_tokens,
            prompt=prompts.draw(i, arrival.input_tokens, arrival.hash_ids),
        )
        for i, arrival in enumerate(arrivals)
    ]


def plan_arrivals(
    config: WorkloadConfig,
    records: Sequence[TraceRecord],
    context_length: int | None,
    rate: float | None,
) -> list[Arrival]:
    """When requests arrive and how long they are, in order of arrival; at least one.

    Args:
        records: the trace; empty means fixed lengths, which are the configured means.
        context_length: tokens that a prompt and its completion may have together; None sets no limit, and a
            trace's lengths stay as they are unless the configuration has means.
        rate: requests a second, mean over the plan; None keeps the times of the trace, by `config.speedup`.

    Raises:
        ConfigError: the lengths cannot fit the context, or arrivals ask for what the trace lacks.
    """
    context_length = _NO_LIMIT if context_length is None else context_length
    if context_length < 2:
        raise ConfigError(
            f"a context of {context_length} tokens has no room for a prompt and its completion; use 2 or more"
        )
    chosen = _select(config, records)
    count = len(chosen) or config.num_requests
    if count is None:
        raise ConfigError("requests: there is no trace to take the number from; give a number")
    inputs, outputs, factor = _lengths(config, chosen, count, context_length)
    hash_block_tokens = max(1, round(HASH_BLOCK_TOKENS * factor))
    hash_ids = [record.hash_ids for record in chosen] or [()] * count
    return [
        Arrival(
            arrival_s=arrival_s,
            input_tokens=input_tokens,
            output_tokens=output_tokens,
            hash_ids=ids,
            hash_block_tokens=hash_block_tokens,
        )
        for arrival_s, input_tokens, output_tokens, ids in zip(
            _arrivals(config, chosen, count, rate).tolist(),
            inputs.tolist(),
            outputs.tolist(),
            hash_ids,
            strict=True,
        )
    ]


def _select(config: WorkloadConfig, records: Sequence[TraceRecord]) -> list[TraceRecord]:
    """As many records as requests. Neighbours stay together where their order carries meaning (times, shared
    prefixes); else they are drawn from the whole trace."""
    count = config.num_requests
    if not records or count is None:
        return list(records)
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


def _arrivals(
    config: WorkloadConfig, chosen: Sequence[TraceRecord], count: int, rate: float | None
) -> Floats:
    """Seconds since the start; the first is 0 and the mean gap is 1 / rate exactly."""
    if rate is not None and not 0.0 < rate < float("inf"):
        raise ConfigError(f"rate = {rate} requests/s; use a number above 0")
    if config.arrivals is Arrivals.TRACE:
        gaps = _trace_gaps(chosen)
        if rate is None:
            return np.concatenate(([0.0], np.cumsum(gaps))) / config.speedup
        if config.speedup != 1.0:
            raise ConfigError(f"speedup = {config.speedup} and rate = {rate} are two answers; give one")
    elif rate is None:
        raise ConfigError(f"{config.arrivals} arrivals need a rate; only trace arrivals have their own")
    else:
        cv = 1.0 if config.arrivals is Arrivals.POISSON else config.cv
        rng = np.random.default_rng([config.seed, _ARRIVALS])
        # A gamma distribution of shape k has a coefficient of variation of 1 / sqrt(k); k = 1 is exponential.
        gaps = rng.gamma(1.0 / cv**2, size=count - 1)
    if count > 1 and not gaps.sum() > 0.0:
        raise ConfigError("all requests of this part of the trace arrive at one time; ask for more of them")
    # Given how many arrive in a span of time, Poisson arrivals are uniform over it: fixing the mean gap
    # leaves the pattern what it was and makes the rate a fact instead of an expectation.
    scaled = gaps * ((count - 1) / rate / gaps.sum()) if count > 1 else gaps
    return np.concatenate(([0.0], np.cumsum(scaled)))


def _trace_gaps(chosen: Sequence[TraceRecord]) -> Floats:
    if not chosen:
        raise ConfigError("trace arrivals need a trace; name one, or use poisson or gamma arrivals")
    times = [record.arrival_s for record in chosen if record.arrival_s is not None]
    if len(times) < len(chosen):
        raise ConfigError(
            "trace arrivals need times, and this trace has lengths only; use poisson or gamma arrivals"
        )
    return np.diff(np.array(times))


def _lengths(
    config: WorkloadConfig, chosen: Sequence[TraceRecord], count: int, context_length: int
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
        return np.full(count, mean_input), np.full(count, mean_output), 1.0
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
