"""What a worker tells Prometheus. One registry a worker, so that several can live in one process.

What a gateway counts by the same word, but from where it stands, has `worker_` in its name here: gateways and
workers are scraped into one database.
"""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from ..proto.worker_pb2 import Load, SequenceOutput, StepSample

_STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2)
_HANDOFF_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.0, 10.0)
_BYTES = tuple(float(4**i * 65536) for i in range(9))  # 64 KiB … 4 GiB
_COUNTS = tuple(float(2**i) for i in range(13))
_OWNERS = ("free", "cached", "running", "reserved", "held", "quarantined")


class HostMetrics:
    """Changed by the host on the event loop; read by whoever serves `registry`."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._count_work(registry)
        self._watch_state(registry)
        # Lookups of labelled children cost more than the steps' own bookkeeping.
        self._seconds_of = {kind: self._step_seconds.labels(kind) for kind in ("prefill", "decode", "mixed")}
        self._tokens_of = {phase: self._step_tokens.labels(phase) for phase in ("prefill", "decode")}
        self._state_of = {
            state: self._terminals.labels(state) for state in ("finished", "cancelled", "failed")
        }

    def _count_work(self, registry: CollectorRegistry) -> None:
        self._step_seconds = Histogram(
            "diphase_step_seconds",
            "Time of engine steps by what they computed",
            ["kind"],
            buckets=_STEP_SECONDS,
            registry=registry,
        )
        self._step_tokens = Counter(
            "diphase_step_tokens_total", "Tokens computed", ["phase"], registry=registry
        )
        self._failed_steps = Counter("diphase_failed_steps_total", "Steps that raised", registry=registry)
        self._handoff_seconds = Histogram(
            "diphase_worker_handoff_seconds",
            "From a hand-off's grant to its verification",
            buckets=_HANDOFF_SECONDS,
            registry=registry,
        )
        self._handoff_tail_seconds = Histogram(
            "diphase_worker_handoff_tail_seconds",
            "From the prefill side's last word to the verification: what a hand-off adds after the prompt",
            buckets=_HANDOFF_SECONDS,
            registry=registry,
        )
        self._handoff_bytes = Histogram(
            "diphase_worker_handoff_bytes", "KV bytes of a hand-off", buckets=_BYTES, registry=registry
        )
        self._handoff_segments = Histogram(
            "diphase_worker_handoff_segments", "Pieces of a hand-off", buckets=_COUNTS, registry=registry
        )
        self._terminals = Counter(
            "diphase_worker_terminals_total",
            "Attempts by how they ended on this worker",
            ["state"],
            registry=registry,
        )
        self._stale = Counter(
            "diphase_worker_stale_outputs_total",
            "Outputs of attempts that were superseded",
            registry=registry,
        )
        self._refused = Counter(
            "diphase_refused_submits_total", "Submits that were refused", ["code"], registry=registry
        )

    def _watch_state(self, registry: CollectorRegistry) -> None:
        self._blocks = Gauge("diphase_kv_blocks", "KV blocks by owner", ["owner"], registry=registry)
        self._preemptions = Gauge("diphase_preemptions", "Sequences preempted since start", registry=registry)
        self._sequences = Gauge(
            "diphase_sequences", "Sequences by state: running, waiting, handoff", ["state"], registry=registry
        )
        self._waiting_tokens = Gauge(
            "diphase_waiting_tokens", "Prompt tokens still to be computed", registry=registry
        )
        self._retained = Gauge(
            "diphase_retained_requests", "Requests that the worker remembers", registry=registry
        )
        self._gateways = Gauge("diphase_attached_gateways", "Gateways with a stream", registry=registry)

    def step(self, sample: StepSample) -> None:
        kind = "mixed" if sample.prefill_tokens and sample.decode_batch else "prefill"
        kind = kind if sample.prefill_tokens else "decode"
        self._seconds_of[kind].observe(sample.duration_s)
        self._tokens_of["prefill"].inc(sample.prefill_tokens)
        self._tokens_of["decode"].inc(sample.decode_batch)

    def step_failed(self) -> None:
        self._failed_steps.inc()

    def outputs(self, outputs: Sequence[SequenceOutput]) -> None:
        for output in outputs:
            if output.HasField("terminal"):
                terminal = output.terminal
                state = (
                    "finished" if terminal.finish_reason else "cancelled" if terminal.cancelled else "failed"
                )
                self._state_of[state].inc()

    def stale_output(self) -> None:
        self._stale.inc()

    def refused(self, code: str) -> None:
        self._refused.labels(code).inc()

    def handed_off(self, seconds: float, tail_s: float, num_bytes: int, num_segments: int) -> None:
        self._handoff_seconds.observe(seconds)
        self._handoff_tail_seconds.observe(tail_s)
        self._handoff_bytes.observe(num_bytes)
        self._handoff_segments.observe(num_segments)

    def state(self, load: Load, num_retained: int, num_gateways: int) -> None:
        """Once a heartbeat."""
        for owner in _OWNERS:
            self._blocks.labels(owner).set(getattr(load, f"blocks_{owner}"))
        self._preemptions.set(load.preemptions)
        self._sequences.labels("running").set(load.running)
        self._sequences.labels("waiting").set(load.waiting_requests)
        self._sequences.labels("handoff").set(load.handoffs)
        self._waiting_tokens.set(load.waiting_tokens)
        self._retained.set(num_retained)
        self._gateways.set(num_gateways)
