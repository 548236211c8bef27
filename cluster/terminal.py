"""What the command line shows with rich: the progress of a start, and tables of a cluster and of requests."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..proto import cluster_pb2
from ..proto import inference_pb2 as pb


class StartDisplay:
    """A line for each thing that is being started. A context manager; lines go when it ends."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.fields[who]:<12}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self._lines: dict[str, TaskID] = {}

    def __enter__(self) -> StartDisplay:
        self._progress.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._progress.stop()

    def report(self, who: str, stage: str, share: float) -> None:
        """`supervisor.Report`."""
        if who not in self._lines:
            self._lines[who] = self._progress.add_task(stage, total=1.0, who=who)
        self._progress.update(self._lines[who], description=stage, completed=share)


def status_table(status: cluster_pb2.GetStatusResponse) -> Table:
    """The workers, one a row, and the requests in the title."""
    verdicts = ", ".join(
        f"{count} {verdict}" for verdict, count in sorted(status.requests_by_slo.items()) if count
    )
    table = Table(
        title=f"{status.model} · {status.running_requests} running, {status.queued_requests} queued "
        f"({status.queued_tokens} tokens)",
        caption=f"requests since start: {verdicts or 'none'} · seen by {status.gateway_id}",
    )
    table.add_column("worker", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for name in ("waiting", "running", "KV blocks used", "for hand-offs", "in flight", "heard"):
        table.add_column(name, justify="right")
    for worker in sorted(status.workers, key=lambda worker: worker.worker_id):
        load = worker.load
        table.add_row(
            worker.worker_id,
            f"[{'green' if worker.state == 'ready' else 'yellow'}]{worker.state}[/]",
            f"{load.waiting_requests}" + (f" ({load.waiting_tokens} tok)" if load.waiting_tokens else ""),
            str(load.running),
            _used(load.blocks_total, load.blocks_free + load.blocks_cached),
            str(load.blocks_held + load.blocks_reserved + load.blocks_quarantined),
            str(load.handoffs),
            f"{worker.heartbeat_age_s:.1f} s",
        )
    return table


def _used(total: int, available: int) -> str:
    if not total:
        return "-"
    return f"{total - available}/{total} ({100 * (total - available) / total:.0f} %)"


def stages_table(responses: Iterable[pb.GenerateResponse]) -> Table:
    """The measured stages of finished requests (their last responses), one a row; milliseconds."""
    table = Table(title="Where the time went, ms")
    numbers = "prompt tokens TTFT TPOT tokenise place queue prefill deliver hand-off KV"
    for name in numbers.split():
        table.add_column(name, justify="right")
    table.add_column("prefilled by → decoded by")
    for response in responses:
        stages = response.stages
        table.add_row(
            f"{response.usage.prompt_tokens}",
            f"{response.usage.completion_tokens}",
            f"{stages.ttft_ms:.1f}",
            f"{stages.tpot_ms:.1f}" if stages.HasField("tpot_ms") else "-",
            f"{stages.tokenise_ms:.1f}",
            f"{stages.placement_ms:.1f}",
            f"{stages.prefill_queue_ms:.1f}",
            f"{stages.prefill_ms:.1f}",
            f"{stages.delivery_ms:.1f}",
            f"{stages.handoff_ms:.1f}" if stages.HasField("handoff_ms") else "-",
            f"{stages.handoff_bytes / 1024:.0f} KiB",
            f"{stages.prefill_worker} → {stages.decode_worker}",
        )
    return table
