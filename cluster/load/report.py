"""What a run came to: percentiles, attainment, throughput, and the files and tables that say so.

Judges the client's own measurements by proto/slo.py; the server's stages and verdicts stand beside them.
Knows nothing of how the load was made."""

from __future__ import annotations

import dataclasses
import errno
import importlib.metadata
import json
import math
import os
import platform
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from ...proto.errors import ConfigError
from ...proto.slo import Slo, Verdict
from .client import Outcome, RequestResult
from .search import Goodput, Point

_PACKAGES = ("diphase", "torch", "ray", "grpcio", "protobuf", "numpy", "uvloop")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Percentiles of a sample, in its unit."""

    p50: float
    p90: float
    p99: float
    mean: float
    max: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """None of an empty sample. Percentiles are interpolated linearly between order statistics."""
        if not values:
            return None
        p50, p90, p99 = (float(p) for p in np.percentile(values, (50, 90, 99)))
        return cls(p50=p50, p90=p90, p99=p99, mean=float(np.mean(values)), max=max(values), count=len(values))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """One run at one rate."""

    rate: float
    """Requests a second, offered."""
    num_requests: int
    outcomes: dict[str, int]
    verdicts: dict[str, int]
    """By proto/slo.py, from the client's own times."""
    server_verdicts: dict[str, int]
    """What the server said of those that finished."""
    attainment: float
    """Share of all requests, rejected and failed ones included, that met both objectives."""
    duration_s: float
    """First planned arrival to last token."""
    requests_per_s: float
    """Finished ones."""
    input_tokens_per_s: float
    output_tokens_per_s: float
    good_requests_per_s: float
    """Those that met both objectives."""
    ttft_ms: Spread | None
    """Of requests with a first token, from their due time."""
    tpot_ms: Spread | None
    itl_ms: Spread | None
    lateness_ms: Spread | None
    """Due to sent: how far the client fell behind its plan."""
    beyond_server_ms: Spread | None
    """Client's TTFT from sending minus the server's: network and client."""
    cached_tokens: int
    stages_ms: dict[str, Spread]
    """The server's stages of those that finished."""
    handoffs: int
    """Finished requests whose KV moved between two workers."""
    workers: dict[str, int]
    """Requests by "prefill worker > decode worker"."""
    errors: dict[str, int]

    @property
    def point(self) -> Point:
        return Point(rate=self.rate, met=self.verdicts.get(Verdict.MET, 0), total=self.num_requests)


def judge(result: RequestResult, slo: Slo) -> Verdict:
    """The verdict on one request from the client's times."""
    if result.outcome is Outcome.REJECTED:
        return Verdict.REJECTED
    if result.outcome is not Outcome.FINISHED or result.ttft_ms is None:
        return Verdict.ERROR
    return slo.verdict(result.ttft_ms, result.tpot_ms)


def offered_rate(results: Sequence[RequestResult]) -> float:
    """Requests a second over the planned arrivals; 0 where all are due at once."""
    span = max(r.due_s for r in results) - min(r.due_s for r in results)
    return (len(results) - 1) / span if span > 0.0 else 0.0


def summarise(results: Sequence[RequestResult], slo: Slo, rate: float | None = None) -> LoadReport:
    """The report of a run of at least one request; `rate` is what was asked for, else the plan's own."""
    finished = [r for r in results if r.outcome is Outcome.FINISHED]
    duration = max(r.last_s for r in results) - min(r.due_s for r in results)
    per_s = 1.0 / duration if duration > 0.0 else 0.0
    verdicts = Counter(str(judge(r, slo)) for r in results)
    met = verdicts[Verdict.MET]
    names = list(dict.fromkeys(name for r in finished for name in r.stages))
    return LoadReport(
        rate=offered_rate(results) if rate is None else rate,
        num_requests=len(results),
        outcomes=dict(Counter(str(r.outcome) for r in results)),
        verdicts=dict(verdicts),
        server_verdicts=dict(Counter(r.server_verdict for r in finished)),
        attainment=met / len(results),
        duration_s=duration,
        requests_per_s=len(finished) * per_s,
        input_tokens_per_s=sum(r.prompt_tokens for r in finished) * per_s,
        output_tokens_per_s=sum(len(r.token_s) for r in results) * per_s,
        good_requests_per_s=met * per_s,
        ttft_ms=Spread.of([r.ttft_ms for r in results if r.ttft_ms is not None]),
        tpot_ms=Spread.of([r.tpot_ms for r in results if r.tpot_ms is not None]),
        itl_ms=Spread.of([gap for r in results for gap in r.itl_ms]),
        lateness_ms=Spread.of([r.lateness_ms for r in results]),
        beyond_server_ms=Spread.of(
            [
                r.ttft_ms - r.lateness_ms - r.stages["ttft_ms"]
                for r in finished
                if r.ttft_ms is not None and "ttft_ms" in r.stages
            ]
        ),
        cached_tokens=sum(r.cached_tokens for r in finished),
        stages_ms={
            name: spread
            for name in names
            if (spread := Spread.of([r.stages[name] for r in finished if name in r.stages]))
        },
        handoffs=sum(r.handoff_bytes > 0 for r in finished),
        workers=dict(Counter(" > ".join(r.workers) for r in finished)),
        errors=dict(Counter(r.detail for r in results if r.detail)),
    )


def environment() -> dict[str, Any]:
    """Date, versions and kind of machine, for a file that must still make sense in a year. Names no host."""
    versions: dict[str, str] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions,
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "cpu": _cpu_model(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_gib": round(memory_bytes / 2**30, 1),
            "gpus": _gpus(),
        },
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    found = {key.strip(): value.strip() for key, value in fields.items()}
    return f"{found.get('model name', 'unknown')}, model {found.get('model', '?')}"


def _gpus() -> list[str]:
    """Models as the NVIDIA driver tells them; none without one."""
    found = []
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("Model:"):
                found.append(line.split(":", 1)[1].strip())
    return found


def to_json(value: Any) -> Any:
    """Dataclasses as objects, infinities as null: what `json.dump` and other languages can read."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def check_output(path: Path) -> None:
    """That write_json() can write there: before a measurement rather than after it.

    Raises:
        ConfigError: it cannot.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as exc:
        raise ConfigError(f"--output {path} cannot be written: {exc.strerror or exc}") from exc


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes `content` whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(to_json(content), indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def run_table(report: LoadReport, slo: Slo) -> Table:
    """One run for the terminal."""
    table = Table(
        title=f"{report.num_requests} requests at {report.rate:.3g}/s: {report.attainment:.1%} met TTFT ≤ "
        f"{slo.ttft_ms:g} ms and TPOT ≤ {slo.tpot_ms:g} ms",
        title_justify="left",
    )
    table.add_column("ms")
    for name in ("p50", "p90", "p99", "mean", "max"):
        table.add_column(name, justify="right")
    rows: list[tuple[str, Spread | None]] = [
        ("TTFT", report.ttft_ms),
        ("TPOT", report.tpot_ms),
        ("ITL", report.itl_ms),
        ("sent late", report.lateness_ms),
        ("TTFT beyond the server's", report.beyond_server_ms),
    ]
    rows += [(f"server: {name.removesuffix('_ms')}", spread) for name, spread in report.stages_ms.items()]
    for label, spread in rows:
        if spread is not None:
            table.add_row(
                label, *(f"{v:.1f}" for v in (spread.p50, spread.p90, spread.p99, spread.mean, spread.max))
            )
    table.caption = (
        f"{report.requests_per_s:.3g} requests/s, {report.good_requests_per_s:.3g} good; tokens/s "
        f"{report.input_tokens_per_s:.0f} in, {report.output_tokens_per_s:.0f} out; "
        f"{_counts(report.outcomes)}; SLO: {_counts(report.verdicts)}"
    )
    return table


def sweep_table(reports: Iterable[LoadReport]) -> Table:
    """One line a rate."""
    table = Table(
        "rate", "met both", "TTFT ms", "TPOT ms", "tokens/s out", caption="latencies: p50 / p90 / p99"
    )
    for report in sorted(reports, key=lambda r: r.rate):
        latencies = [
            f"{s.p50:.0f} / {s.p90:.0f} / {s.p99:.0f}" if s else "–" for s in (report.ttft_ms, report.tpot_ms)
        ]
        table.add_row(
            f"{report.rate:.3g}", f"{report.attainment:.1%}", *latencies, f"{report.output_tokens_per_s:.0f}"
        )
    return table


def goodput_text(found: Goodput) -> str:
    """A goodput as a person reads it, with its 95 % interval."""
    high = "∞" if math.isinf(found.high) else f"{found.high:.2f}"
    if found.bracketed:
        return f"{found.rate:.2f} ({found.low:.2f}–{high})"
    return f"≥ {found.rate:.2f}" if found.rate > 0.0 else "below the lowest rate"


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
