"""What a gateway counts, for Prometheus. Label children are bound once: a request pays for arithmetic
only."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from ..proto.slo import Verdict
from .latency import RequestTimes

LATENCY_BUCKETS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0,
)  # fmt: skip
TOKEN_BUCKETS = (
    0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5,
)  # fmt: skip
BYTE_BUCKETS = tuple(float(4**i * 1024) for i in range(1, 11))
COUNT_BUCKETS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 512.0, 2048.0, 8192.0)
TERMINALS = ("finished", "rejected", "cancelled", "failed")


class GatewayMetrics:
    """One gateway's metrics in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._ttft = self._histogram("ttft_seconds", "Receipt to token 0 written to the client")
        self._tpot = self._histogram(
            "tpot_seconds", "Mean time for each token after the first", TOKEN_BUCKETS
        )
        self._itl = self._histogram(
            "itl_seconds", "Time between neighbouring messages of a request, for each token", TOKEN_BUCKETS
        )
        self._queue = self._histogram("prefill_queue_seconds", "Submit to first scheduled at the worker")
        self._handoff = self._histogram(
            "handoff_seconds", "Token 0 sampled to KV verified at the decode worker"
        )
        self._handoff_bytes = self._histogram("handoff_bytes", "KV bytes of a hand-off", BYTE_BUCKETS)
        self._handoff_segments = self._histogram(
            "handoff_segments", "Runs of bytes of a hand-off", COUNT_BUCKETS
        )
        slo = self._counter("requests", "Requests by how they met their objectives", "slo")
        self._verdicts = {verdict: slo.labels(verdict.value) for verdict in Verdict}
        ended = self._counter("requests_ended", "Requests by terminal state", "state")
        self._terminals = {state: ended.labels(state) for state in TERMINALS}
        placed = self._counter("placements", "Attempts by kind of placement", "kind")
        self._pair, self._local = placed.labels("pair"), placed.labels("local")
        tokens = self._counter("tokens", "Tokens by kind", "kind")
        self._prompt, self._cached = tokens.labels("prompt"), tokens.labels("cached")
        self._completion = tokens.labels("completion")
        self._retries = self._counter("retries", "Attempts after the first, by error code", "code")
        self._stale = self._counter("stale_outputs", "Outputs of attempts that were over")
        self.requests_by_slo = dict.fromkeys((verdict.value for verdict in Verdict), 0)

    def gauge(self, name: str, documentation: str, read: Callable[[], float]) -> None:
        """A value that is read when Prometheus asks."""
        Gauge(f"diphase_{name}", documentation, registry=self.registry).set_function(read)

    def gauges(
        self, name: str, documentation: str, label: str, values: Iterable[str], read: Callable[[str], float]
    ) -> None:
        """One such value for each value of a label."""
        gauge = Gauge(f"diphase_{name}", documentation, [label], registry=self.registry)
        for value in values:
            gauge.labels(value).set_function(partial(read, value))

    def placed(self, pair: bool) -> None:
        (self._pair if pair else self._local).inc()

    def retried(self, code: str) -> None:
        self._retries.labels(code).inc()

    def stale(self) -> None:
        self._stale.inc()

    def token_gap(self, seconds_per_token: float) -> None:
        """A message of later tokens was written."""
        self._itl.observe(seconds_per_token)

    def handed_off(self, times: RequestTimes) -> None:
        """Token 1 came after a hand-off."""
        self._handoff.observe(times.handoff_s)
        self._handoff_bytes.observe(times.handoff_bytes)
        self._handoff_segments.observe(times.handoff_segments)

    def rejected(self) -> None:
        """Turned away before it was accepted, because of load."""
        self._ended("rejected", Verdict.REJECTED)

    def cancelled(self) -> None:
        self._ended("cancelled", Verdict.CANCELLED)

    def failed(self) -> None:
        self._ended("failed", Verdict.ERROR)

    def finished(self, times: RequestTimes, verdict: Verdict, prompt_tokens: int) -> None:
        self._ended("finished", verdict)
        self._ttft.observe(times.ttft_ms / 1000.0)
        tpot_ms = times.tpot_ms
        if tpot_ms is not None:
            self._tpot.observe(tpot_ms / 1000.0)
        if times.prefill_scheduled_at is not None and times.submitted_at is not None:
            self._queue.observe(times.prefill_scheduled_at - times.submitted_at)
        self._prompt.inc(prompt_tokens)
        self._cached.inc(times.cached_tokens)
        self._completion.inc(times.num_written)

    def _ended(self, state: str, verdict: Verdict) -> None:
        self._terminals[state].inc()
        self._verdicts[verdict].inc()
        self.requests_by_slo[verdict.value] += 1

    def _histogram(
        self, name: str, documentation: str, buckets: tuple[float, ...] = LATENCY_BUCKETS
    ) -> Histogram:
        return Histogram(f"diphase_{name}", documentation, buckets=buckets, registry=self.registry)

    def _counter(self, name: str, documentation: str, *labels: str) -> Counter:
        return Counter(f"diphase_{name}", documentation, labels, registry=self.registry)
