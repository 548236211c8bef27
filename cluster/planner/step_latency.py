"""Tables of prefill and decode step latency by model, system, backend and tensor parallelism, as step times.

The files have the columns model, system, backend, tp, phase (prefill or decode), batch, isl, prefix and
latency_ms. A decode row is a step of `batch` sequences with `isl` tokens of context each; a prefill row
computes the last `isl - prefix` tokens of `batch` prompts. Knows nothing of how they were measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from ...proto.errors import ConfigError
from .table_files import missing, positive_int, positive_number, read_rows
from .tables import PrefillPoint, TableStepTime

FOLDER = "step_latency"


class Setup(NamedTuple):
    """What a worker is, as the tables name it."""

    model: str
    system: str
    backend: str
    tp: int


class Row(NamedTuple):
    """A measured step."""

    setup: Setup
    phase: str
    batch: int
    isl: int
    """Tokens of each sequence; of a prompt, its cached prefix included."""
    prefix: int
    seconds: float

    @property
    def prefill_point(self) -> PrefillPoint:
        """The prompts' tokens that are computed and their context, as in StepShape."""
        tokens = self.isl - self.prefix
        return PrefillPoint(
            self.batch * tokens, self.batch * tokens * (self.prefix + tokens / 2.0), self.seconds
        )


def step_latency_time(
    folder: Path, *, model: str, system: str, backend: str, tp: int, pp: int = 1
) -> TableStepTime:
    """The step time of `model` (with or without its owner) on `system` (with or without its form factor).

    Raises:
        ConfigError: that was not measured (the message says what was), or a file is missing or malformed.
    """
    if pp != 1:
        raise missing(f"{model} with pp", pp, (1,))
    by_setup = read_step_latency(folder)
    candidates: list[Setup] = list(by_setup)
    for what, asked, names in (
        ("model", model, lambda setup: (setup.model, setup.model.rpartition("/")[2])),
        ("system", system, lambda setup: (setup.system, setup.system.partition("_")[0])),
        ("backend", backend, lambda setup: (setup.backend,)),
        ("tp", tp, lambda setup: (setup.tp,)),
    ):
        left = [setup for setup in candidates if asked in names(setup)]
        if not left:
            raise missing(f"the {what}", asked, (getattr(setup, what) for setup in candidates))
        candidates = left
    return table_of(by_setup[candidates[0]])


def read_step_latency(folder: Path) -> dict[Setup, list[Row]]:
    """All tables' rows below the data folder.

    Raises:
        ConfigError: there is no table, or one is malformed.
    """
    paths = sorted((folder / FOLDER).glob("*.csv"))
    if not paths:
        raise ConfigError(f"step times need tables in {folder / FOLDER}; there is no CSV file")
    by_setup: dict[Setup, list[Row]] = {}
    for path in paths:
        for row in read_rows(path, _row):
            by_setup.setdefault(row.setup, []).append(row)
    return by_setup


def table_of(rows: Iterable[Row]) -> TableStepTime:
    """Interpolates between the rows of one setup.

    Raises:
        ConfigError: they are too few.
    """
    rows = list(rows)
    return TableStepTime(
        {(row.batch, float(row.isl)): row.seconds for row in rows if row.phase == "decode"},
        [row.prefill_point for row in rows if row.phase == "prefill"],
    )


def _row(row: Mapping[str, str]) -> Row:
    setup = Setup(row["model"], row["system"], row["backend"], positive_int(row["tp"]))
    phase, isl, prefix = row["phase"], positive_int(row["isl"]), int(row["prefix"])
    if phase not in {"prefill", "decode"}:
        raise ValueError(f"the phase {phase!r} is neither prefill nor decode")
    if not 0 <= prefix < isl:
        raise ValueError(f"a prefix of {prefix} of {isl} tokens")
    return Row(
        setup, phase, positive_int(row["batch"]), isl, prefix, positive_number(row["latency_ms"]) / 1e3
    )
