"""Splitwise's measurements (ISCA 2024: Llama2-70B and BLOOM-176B on A100, H100, capped H100), as step times.

The file is of its simulator (github.com/Mutinifni/splitwise-sim, data/perf_model.csv). A row is a run of
`batch_size` prompts of `prompt_size` tokens that were to generate `token_size` each: the time of the prompt
step and the mean time of a token. Batches above 1 were measured at one prompt length, longer contexts at
batch 1; the model joins both. Knows nothing of power.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import fmean, median
from typing import NamedTuple

from ...proto.errors import ConfigError
from .table_files import existing, missing, positive_int, positive_number, read_rows
from .tables import PrefillPoint, TableStepTime

FILE = "splitwise_perf/perf_model.csv"
SOURCE = "https://github.com/Mutinifni/splitwise-sim/tree/main/data"
MAX_UNEXPLAINED = 2.0
"""A run whose time is so many times that of its prompt step and tokens did not run as one batch: it waited
for memory. Its token time is not its batch's."""


class Setup(NamedTuple):
    """What a machine is, as the file names it."""

    model: str
    hardware: str
    tp: int


class Run(NamedTuple):
    """A measured run; seconds."""

    setup: Setup
    prompt_size: int
    batch_size: int
    token_size: int
    prompt_s: float
    token_s: float
    e2e_s: float

    @property
    def generated(self) -> float:
        """Tokens of each sequence: those asked for, or fewer where the time says that it ended before."""
        return min(float(self.token_size), 1.0 + (self.e2e_s - self.prompt_s) / self.token_s)

    @property
    def context(self) -> float:
        """Mean context of each sequence while tokens were generated."""
        return self.prompt_size + self.generated / 2.0

    @property
    def as_one_batch(self) -> bool:
        """Whether all prompts ran together all the time."""
        return self.e2e_s <= MAX_UNEXPLAINED * (self.prompt_s + self.token_s * (self.token_size - 1))


def splitwise_step_time(folder: Path, *, model: str, hardware: str, tp: int, pp: int = 1) -> TableStepTime:
    """The step time of `model` on `hardware` (a100-80gb, h100-80gb, h100-80gb-pcap).

    Raises:
        ConfigError: that was not measured (the message says what was), or the file is missing or malformed.
    """
    if pp != 1:
        raise missing(f"{model} with pp", pp, (1,))
    by_setup = read_splitwise(folder)
    setup = Setup(model, hardware, tp)
    if setup not in by_setup:
        raise missing(
            "the model, hardware and tp", " ".join(map(str, setup)), (" ".join(map(str, s)) for s in by_setup)
        )
    return table_of(by_setup[setup])


def read_splitwise(folder: Path) -> dict[Setup, list[Run]]:
    """All runs below the data folder, also those that did not run as one batch.

    Raises:
        ConfigError: the file is missing or malformed.
    """
    by_setup: dict[Setup, list[Run]] = {}
    for run in read_rows(existing(folder, FILE, SOURCE), _run):
        by_setup.setdefault(run.setup, []).append(run)
    return by_setup


def table_of(runs: Iterable[Run]) -> TableStepTime:
    """Joins one setup's runs: a token of context costs what it does at batch 1, whatever the batch.

    Raises:
        ConfigError: they are too few.
    """
    runs = [run for run in runs if run.as_one_batch]
    per_context = _per_context([run for run in runs if run.batch_size == 1])
    decode: dict[tuple[int, float], float] = {}
    longest = max((run.context for run in runs), default=0.0)
    for batch in sorted({run.batch_size for run in runs}):
        without_kv = median(
            run.token_s - per_context * batch * run.context for run in runs if run.batch_size == batch
        )
        for context in (0.0, longest):
            decode[batch, context] = without_kv + per_context * batch * context
    prefill: dict[tuple[int, float], list[float]] = {}
    for run in runs:
        tokens = run.batch_size * run.prompt_size
        prefill.setdefault((tokens, tokens * run.prompt_size / 2.0), []).append(run.prompt_s)
    return TableStepTime(
        decode, [PrefillPoint(tokens, context, median(s)) for (tokens, context), s in prefill.items()]
    )


def _per_context(runs: list[Run]) -> float:
    """Seconds a token of context: least squares over the prompt lengths' medians, of runs that generated the
    same number of tokens (runs of other lengths are of other days, and up to 9 % off)."""
    token_sizes = [run.token_size for run in runs]
    usual = max(sorted(set(token_sizes)), key=token_sizes.count, default=0)
    by_prompt: dict[int, list[Run]] = {}
    for run in runs:
        if run.token_size == usual:
            by_prompt.setdefault(run.prompt_size, []).append(run)
    if len(by_prompt) < 2:
        raise ConfigError("token times need runs at batch 1 with at least two prompt lengths")
    points = [
        (median(r.context for r in group), median(r.token_s for r in group)) for group in by_prompt.values()
    ]
    mean_x, mean_y = fmean(x for x, _ in points), fmean(y for _, y in points)
    moment = sum((x - mean_x) * (y - mean_y) for x, y in points)
    return max(0.0, moment / sum((x - mean_x) ** 2 for x, _ in points))


def _run(row: Mapping[str, str]) -> Run:
    return Run(
        Setup(row["model"], row["hardware"], positive_int(row["tensor_parallel"])),
        positive_int(row["prompt_size"]),
        positive_int(row["batch_size"]),
        positive_int(row["token_size"]),
        positive_number(row["prompt_time"]) / 1e3,
        positive_number(row["token_time"]) / 1e3,
        positive_number(row["e2e_time"]) / 1e3,
    )
