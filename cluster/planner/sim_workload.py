"""Workloads for the simulator: arrivals and lengths of `diphase bench`, at any rate and for any seed.

Knows nothing of deployments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from ...proto.errors import ConfigError
from ..load.trace_formats import TraceRecord
from ..load.workload import Arrival, WorkloadConfig, plan_arrivals
from .events import to_ns
from .sim_request import SimRequest

LEAST_REQUESTS = 300
Lengths = Sequence[tuple[int, int]]
"""(prompt tokens, completion tokens) of each request."""


@dataclass(slots=True, kw_only=True)
class SimWorkload:
    """One kind of load. Plans of one seed are one pattern, stretched in time by the rate."""

    config: WorkloadConfig
    """Its seed is the first of several, its number of requests the least."""
    records: Sequence[TraceRecord] = ()
    context_length: int | None = None
    block_size: int = 16
    """Tokens that a block hash stands for."""
    _plans: dict[tuple[int, int], list[Arrival]] = field(default_factory=dict)

    def requests(self, rate: float, seed: int, count: int) -> list[SimRequest]:
        """Fresh requests at `rate` requests/s.

        Raises:
            ConfigError: the trace lacks what the arrivals ask for.
        """
        return requests_of(self._plan(seed, count), self.block_size, rate)

    def lengths(self, seed: int, count: int) -> list[tuple[int, int]]:
        """Of the requests of that seed."""
        return [(arrival.input_tokens, arrival.output_tokens) for arrival in self._plan(seed, count)]

    @property
    def shares(self) -> bool:
        """Whether prompts have blocks in common, so that less than their tokens may have to be computed."""
        return any(record.hash_ids for record in self.records[:1])

    @property
    def least(self) -> int:
        """The configured number."""
        return self.config.num_requests or LEAST_REQUESTS

    def most(self, count: int) -> int:
        """The most requests up to `count` that a plan may have."""
        limited = self.records and (self.shares or self.config.arrivals == "trace")
        return min(count, len(self.records)) if limited else count

    def _plan(self, seed: int, count: int) -> list[Arrival]:
        plan = self._plans.get((seed, count))
        if plan is None:
            config = replace(self.config, seed=self.config.seed + seed, num_requests=count)
            plan = plan_arrivals(config, self.records, self.context_length, 1.0)
            self._plans[seed, count] = plan
        return plan


@dataclass(frozen=True, slots=True)
class PublishedWorkload:
    """As DistServe's released simulator draws it: the lengths in their order, gaps of numpy's old generator,
    the first request at once."""

    pairs: tuple[tuple[int, int], ...]
    shares = False

    def __post_init__(self) -> None:
        if not self.pairs:
            raise ConfigError("a workload needs at least one request")

    def requests(self, rate: float, seed: int, count: int) -> list[SimRequest]:
        """The first `count` of them at `rate` requests/s."""
        pairs = self.pairs[:count]
        gaps = np.random.RandomState(seed).gamma(1.0, 1.0 / rate, size=len(pairs) - 1)
        times = np.concatenate(([0.0], np.cumsum(gaps)))
        return [
            SimRequest(index=i, arrival=to_ns(time), prompt_tokens=prompt, output_tokens=output, hashes=[])
            for i, (time, (prompt, output)) in enumerate(zip(times.tolist(), pairs, strict=True))
        ]

    def lengths(self, seed: int, count: int) -> list[tuple[int, int]]:
        """The same for every seed."""
        return list(self.pairs[:count])

    @property
    def least(self) -> int:
        """All."""
        return len(self.pairs)

    def most(self, count: int) -> int:
        """No more than there are."""
        return min(count, len(self.pairs))


class Workload(Protocol):
    """Requests of one pattern at any rate."""

    @property
    def shares(self) -> bool:
        """Whether prompts have blocks in common."""
        ...

    @property
    def least(self) -> int:
        """Requests that a run has at least."""
        ...

    def requests(self, rate: float, seed: int, count: int) -> list[SimRequest]:
        """Fresh ones."""
        ...

    def lengths(self, seed: int, count: int) -> list[tuple[int, int]]:
        """(prompt, completion) tokens of the same requests."""
        ...

    def most(self, count: int) -> int:
        """The most requests up to `count` that there can be."""
        ...


def usual_lengths(workload: Workload) -> Lengths:
    """Of the requests of a short run."""
    return workload.lengths(0, workload.most(workload.least))


def requests_of(arrivals: Sequence[Arrival], block_size: int, rate: float = 1.0) -> list[SimRequest]:
    """The plan of a load as the simulator takes it, fresh ones at each call.

    Args:
        rate: what the plan's times are divided by.
    """
    return [
        SimRequest(
            index=i,
            arrival=to_ns(arrival.arrival_s / rate),
            prompt_tokens=arrival.input_tokens,
            output_tokens=arrival.output_tokens,
            hashes=_block_hashes(arrival, block_size),
        )
        for i, arrival in enumerate(arrivals)
    ]


def _block_hashes(arrival: Arrival, block_size: int) -> list[bytes]:
    """Of the prompt's full blocks. An id of the trace names all of the prompt up to its end, so a block that
    ends inside of it is named by it and by where it ends."""
    if not arrival.hash_ids:
        return []
    last = len(arrival.hash_ids) - 1
    ends = range(block_size, arrival.input_tokens + 1, block_size)
    return [
        b"%d:%d" % (arrival.hash_ids[min(last, (end - 1) // arrival.hash_block_tokens)], end) for end in ends
    ]
