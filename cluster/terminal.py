"""What the command line shows with rich: the progress of a start, and tables of a cluster and of requests."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from ..proto import cluster_pb2
from ..proto import inference_pb2 as pb
from .status_notes import notes


class StartDisplay:
    """What is being started, a bar for each in a terminal and else a line for each stage. A context
    manager."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.fields[who]:<12}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._bars: dict[str, TaskID] = {}
        self._stages: dict[str, str] = {}

    def __enter__(self) -> StartDisplay:
        self._progress.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._progress.stop()

    def report(self, who: str, stage: str, share: float) -> None:
        """`supervisor.Report`."""
        if who not in self._bars:
            self._bars[who] = self._progress.add_task(stage, total=1.0, who=who)
        self._progress.update(self._bars[who], description=stage, completed=share)
        if not self._console.is_terminal and self._stages.get(who) != stage:
            self._stages[who] = stage
            self._console.print(f"{who}: {stage}", markup=False, highlight=False)


def status_table(status: cluster_pb2.GetStatusResponse, not_ready: str) -> Table:
    """The workers, one a row, and the requests in the title; below, why some are not ready. It fits a
    terminal of 80 columns."""
    verdicts = ", ".join(
        f"{count} {verdict}" for verdict, count in sorted(status.requests_by_slo.items()) if count
    )
    caption = f"requests since start: {verdicts or 'none'}\nseen by {status.gateway_id}"
    if status.metrics_address:
        caption += f" · its metrics: http://{status.metrics_address}/metrics"
    for note in notes(status):
        caption += f"\n{note}"
    if not_ready:
        caption += f"\n{not_ready}"
    table = Table(
        title=f"{status.model} · {status.running_requests} running, {status.queued_requests} queued "
        f"({status.queued_tokens} tokens)",
        caption=Text(caption),  # no markup: others wrote some of it
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
        pad_edge=False,
    )
    table.add_column("worker", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for name in ("waiting", "running", "KV blocks", "held", "moving", "heard"):
        table.add_column(name, justify="right", no_wrap=True)
    for worker in sorted(status.workers, key=lambda worker: worker.worker_id):
        load = worker.load
        table.add_row(
            worker.worker_id,
            f"[{'green' if worker.state == 'ready' else 'yellow'}]{worker.state}[/]",
            str(load.waiting_requests),
            str(load.running),
            _used(load.blocks_total, load.blocks_free + load.blocks_cached),
            str(load.blocks_held + load.blocks_reserved + load.blocks_quarantined),
            str(load.handoffs),
            f"{worker.heartbeat_age_s:.{1 if worker.heartbeat_age_s < 10.0 else 0}f} s",
        )
    return table


def transfers_table(status: cluster_pb2.GetStatusResponse) -> Table | None:
    """What each worker sent (→) or received (←), by peer, and below why what failed, failed; None before the
    first hand-off. It fits a terminal of 80 columns."""
    table = Table(title="KV transfers", box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    table.add_column("between", no_wrap=True)
    table.add_column("over", no_wrap=True)
    for name in ("done", "moved", "took", "fences", "quarant.", "failed"):
        table.add_column(name, justify="right", no_wrap=True)
    notes = ["took: on the wire (→ sent), in its check (← received), summed"]
    for worker in sorted(status.workers, key=lambda worker: worker.worker_id):
        for peer in sorted(worker.transfers, key=lambda peer: (peer.peer, peer.transport)):
            between = f"{worker.worker_id} {'→' if peer.outgoing else '←'} {peer.peer}"
            table.add_row(
                between,
                peer.transport,
                str(peer.transfers),
                _size(peer.bytes),
                f"{peer.wire_s if peer.outgoing else peer.verify_s:.2f} s",
                str(peer.fences),
                str(peer.quarantined_blocks),
                str(sum(peer.failures.values())),
            )
            if peer.failures:
                reasons = ", ".join(f"{count} {code}" for code, count in sorted(peer.failures.items()))
                notes.append(f"{between}, failed: {reasons}")
    table.caption = Text("\n".join(notes))
    return table if table.row_count else None


def _size(num_bytes: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if num_bytes >= size:
            return f"{num_bytes / size:.{1 if num_bytes < 10 * size else 0}f} {unit}"
    return f"{num_bytes / 1024:.0f} KiB"


def _used(total: int, available: int) -> str:
    if not total:
        return "-"
    return f"{total - available}/{total} {100 * (total - available) / total:.0f} %"


def stages_table(responses: Sequence[pb.GenerateResponse]) -> Table:
    """Finished requests (their last responses), one a column: what was measured, milliseconds where not
    said; in how many attempts, where one failed."""
    table = Table(title="Measured, ms")
    table.add_column("prompt", no_wrap=True)
    for number in range(1, len(responses) + 1):
        table.add_column(str(number), justify="right", overflow="fold")  # an id must be whole
    for name, value in _MEASURED:
        table.add_row(name, *(value(response) for response in responses), end_section=name.startswith("TPOT"))
    if any(response.stages.attempts > 1 for response in responses):
        table.add_row("attempts", *(str(response.stages.attempts) for response in responses))
    return table


_MEASURED: tuple[tuple[str, Callable[[pb.GenerateResponse], str]], ...] = (
    ("request", lambda r: r.request_id),
    ("tokens in / out", lambda r: f"{r.usage.prompt_tokens} / {r.usage.completion_tokens}"),
    ("TTFT", lambda r: f"{r.stages.ttft_ms:.1f}"),
    (
        "TPOT, mean of tokens 1 on",
        lambda r: f"{r.stages.tpot_ms:.1f}" if r.stages.HasField("tpot_ms") else "-",
    ),
    ("TTFT: tokenise", lambda r: f"{r.stages.tokenise_ms:.1f}"),
    ("  placement", lambda r: f"{r.stages.placement_ms:.1f}"),
    ("  prefill queue", lambda r: f"{r.stages.prefill_queue_ms:.1f}"),
    ("  prefill", lambda r: f"{r.stages.prefill_ms:.1f}"),
    ("  delivery", lambda r: f"{r.stages.delivery_ms:.1f}"),
    ("token 1: hand-off", lambda r: f"{r.stages.handoff_ms:.1f}"),
    ("  decode queue", lambda r: f"{r.stages.decode_queue_ms:.1f}"),
    ("  first decode step", lambda r: f"{r.stages.first_decode_ms:.1f}"),
    ("KV moved", lambda r: f"{r.stages.handoff_bytes / 1024:.0f} KiB"),
    ("prefilled by", lambda r: r.stages.prefill_worker),
    ("decoded by", lambda r: r.stages.decode_worker),
)
