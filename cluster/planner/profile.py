"""What `diphase profile` found out about an engine on a machine, and its file: step times, memory, what
workers on one machine cost each other, and what serving adds.

A source of step times for the simulator. It measures nothing (cluster/profile_command.py does, with
engine/profiler.py and cluster/load) and loads no torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from ...proto.errors import ConfigError
from ...router.latency_model import Coefficients
from ...router.step_time import StepShape
from .profile_fit import StepCell, fit_steps
from .regime_step_time import Regimes, RegimeStepTime, kind_of

SCHEMA = 2
STEP_KINDS = ("prefill", "decode", "mixed")
KINDS = ("prefill", "decode")
MOST_S = 3600.0
"""Of a step or one of its terms."""
MOST_SIZE = 2**31 - 1


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingCost:
    """What a request and a step take in a cluster beside the engine's own time."""

    first_token_s: float = 0.0
    """From the client to the worker and from there back, for the first token: tokenising, placement, two
    messages each way."""
    first_token_beside_s: float = 0.0
    """The same while another worker of the machine computes, too."""
    step_s: float = 0.0
    """Of each step: the worker's scheduler, its event loop, its messages."""
    step_per_sequence_s: float = 0.0
    """Of each step, for each sequence that decodes in it."""
    handoff_s: float = 0.0
    """Of a hand-off, beside its bytes."""
    handoff_bytes_per_s: float = float("inf")

    def __post_init__(self) -> None:
        for name in ("first_token_s", "first_token_beside_s", "step_s", "step_per_sequence_s", "handoff_s"):
            seconds = getattr(self, name)
            if not _is_number(seconds) or not 0.0 <= seconds < 3600.0:
                raise ConfigError(f"serving.{name} = {seconds} is out of range; use 0 to 3600")
        if not _is_number(self.handoff_bytes_per_s) or not self.handoff_bytes_per_s > 0.0:
            raise ConfigError(
                f"serving.handoff_bytes_per_s = {self.handoff_bytes_per_s}; use a number above 0"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Slowdown:
    """How many times longer a step takes while another worker of the machine computes: [own][neighbour's],
    of prefill and decode. All 1: they do not feel each other."""

    factors: Mapping[str, Mapping[str, float]]

    def __post_init__(self) -> None:
        for own in KINDS:
            for beside in KINDS:
                factors = self.factors.get(own)
                factor = factors.get(beside) if isinstance(factors, Mapping) else None
                if not _is_number(factor) or not 1.0 <= factor < 1e3:
                    raise ConfigError(f"slowdown.{own}.{beside} = {factor}; use 1 to 1000")

    def of(self, own: str, prefill_busy: float, decode_busy: float) -> float:
        """With neighbours that together compute prompts and decode for such shares of the time."""
        factors = self.factors[own]
        return 1.0 + (factors["prefill"] - 1.0) * prefill_busy + (factors["decode"] - 1.0) * decode_busy


ALONE = Slowdown(factors={own: dict.fromkeys(KINDS, 1.0) for own in KINDS})


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFacts:
    """Which engine was measured, and its memory."""

    model: str
    dtype: str
    block_size: int
    kv_cache_mib: int
    threads: int
    num_blocks: int
    block_bytes: int
    """Of the whole model's KV."""
    num_layers: int
    context_length: int

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in ("model", "dtype"):
                if not isinstance(value, str) or not value:
                    raise ConfigError(f"engine.{field.name} = {value!r}; use a name")
            elif type(value) is not int or not 1 <= value <= MOST_SIZE:
                raise ConfigError(
                    f"engine.{field.name} = {value!r}; use a whole number above 0, at most {MOST_SIZE}"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class StepErrors:
    """Relative errors of one kind of step, over its cells."""

    median: float
    worst: float
    hold_out_median: float
    hold_out_worst: float
    cells: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CellReport:
    """A kind of step that was measured, and how far the fit is from it."""

    shape: StepShape
    median_s: float
    fastest_s: float
    runs: int
    error: float
    """Predicted / measured - 1."""
    hold_out_error: float
    """The same, of a fit that had not seen it."""

    def __post_init__(self) -> None:
        sizes = self.shape._asdict()
        for name, value in {**sizes, "median_s": self.median_s, "fastest_s": self.fastest_s}.items():
            if not _is_number(value) or not 0.0 <= value < math.inf:
                raise ConfigError(f"cells: {name} = {value!r} of a step; use a number of at least 0")
        for name in ("prefill_tokens", "decode_batch"):
            if type(sizes[name]) is not int or sizes[name] > MOST_SIZE:
                raise ConfigError(
                    f"cells: {name} = {sizes[name]!r} of a step; use a whole number, at most {MOST_SIZE}"
                )
        if not any(sizes.values()):
            raise ConfigError("cells: a step without work; give its prompt tokens or its decode batch")
        for name in ("error", "hold_out_error"):
            if not _is_number(value := getattr(self, name)) or not math.isfinite(value):
                raise ConfigError(f"cells: {name} = {value!r} of a step; use a finite number")

    @property
    def kind(self) -> str:
        """prefill, decode or mixed."""
        return kind_of(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """One engine on one machine."""

    engine: EngineFacts
    machine: Mapping[str, Any]
    """Date, versions and kind of machine, for people."""
    step_time: RegimeStepTime
    coefficients: Coefficients
    """One set for all steps: what the live router's model would have come to."""
    cells: tuple[CellReport, ...]
    slowdown: Slowdown = ALONE
    serving: ServingCost = ServingCost()

    def __post_init__(self) -> None:
        for has, what in (("prefill_tokens", "prompts"), ("decode_batch", "decoding sequences")):
            if not any(getattr(cell.shape, has) for cell in self.cells):
                raise ConfigError(f"cells: no step has {what}; make the profile with `diphase profile`")
        here = self.machine.get("machine", {})
        if not isinstance(here, Mapping):
            raise ConfigError(f"machine = {here!r}; use a table, with cpu and cores")
        if type(here.get("cores", 1)) is not int or here.get("cores", 1) < 1:
            raise ConfigError(f"machine.cores = {here['cores']!r}; use a whole number above 0")

    def measured_s(self, shape: StepShape) -> float:
        """What a step of the profile took.

        Raises:
            ConfigError: it has no such step.
        """
        for cell in self.cells:
            if cell.shape == shape:
                return cell.median_s
        raise ConfigError(f"the profile has no step of {shape}; make one anew with `diphase profile`")

    def errors(self, kind: str) -> StepErrors:
        """Of one kind of step."""
        cells = [cell for cell in self.cells if cell.kind == kind]
        seen, unseen = (
            np.abs([getattr(cell, name) for cell in cells]) for name in ("error", "hold_out_error")
        )
        return StepErrors(
            median=float(np.median(seen)),
            worst=float(seen.max()),
            hold_out_median=float(np.median(unseen)),
            hold_out_worst=float(unseen.max()),
            cells=len(cells),
        )

    def to_dict(self) -> dict[str, Any]:
        """For the file."""
        cells = [{**asdict(cell), "kind": cell.kind, "shape": cell.shape._asdict()} for cell in self.cells]
        kinds = dict.fromkeys(cell.kind for cell in self.cells)
        return {
            "schema": SCHEMA,
            **self.machine,
            "engine": asdict(self.engine),
            "step_time": {kind: _table(getattr(self.step_time, kind)) for kind in STEP_KINDS},
            "coefficients": self.coefficients._asdict(),
            "slowdown": {own: dict(beside) for own, beside in self.slowdown.factors.items()},
            "serving": asdict(self.serving),
            "errors": {kind: asdict(self.errors(kind)) for kind in kinds},
            "cells": cells,
        }


def make_profile(
    engine: EngineFacts,
    machine: Mapping[str, Any],
    cells: Sequence[StepCell],
    slowdown: Slowdown = ALONE,
) -> Profile:
    """The profile of measured steps.

    Raises:
        ConfigError: there are too few kinds of them.
    """
    fit = fit_steps(cells)
    reports = tuple(
        CellReport(
            shape=cell.shape,
            median_s=cell.median_s,
            fastest_s=min(cell.seconds),
            runs=len(cell.seconds),
            error=error,
            hold_out_error=hold_out,
        )
        for cell, error, hold_out in zip(cells, fit.errors, fit.hold_out, strict=True)
    )
    return Profile(
        engine=engine,
        machine=machine,
        step_time=fit.step_time,
        coefficients=fit.coefficients,
        cells=reports,
        slowdown=slowdown,
    )


def load_profile(path: Path) -> Profile:
    """
    Raises:
        ConfigError: it cannot be read, or is no profile of this version; the message names the field.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise ConfigError(f"the profile {path} cannot be read: {exc.strerror or exc}") from exc
    except (ValueError, RecursionError) as exc:
        raise ConfigError(f"the profile {path} is no JSON: {exc}") from exc
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise ConfigError(f"{path} is no profile of schema {SCHEMA}; make one with `diphase profile`")
    try:
        return _from_dict(content)
    except KeyError as exc:
        raise ConfigError(f"the profile {path} lacks {exc}") from exc
    except (TypeError, ValueError, AttributeError, OverflowError) as exc:
        raise ConfigError(f"the profile {path} is malformed: {exc}") from exc
    except ConfigError as exc:
        raise ConfigError(f"the profile {path}: {exc.message}") from exc


def _from_dict(content: dict[str, Any]) -> Profile:
    step_time, serving = _section(content, "step_time"), dict(_section(content, "serving"))
    if serving["handoff_bytes_per_s"] is None:  # JSON has no infinity
        serving["handoff_bytes_per_s"] = math.inf
    known = ("schema", "engine", "step_time", "coefficients", "slowdown", "serving", "errors", "cells")
    if not isinstance(content["cells"], list):
        raise ConfigError(f"cells = {content['cells']!r}; use a list of steps")
    return Profile(
        engine=EngineFacts(**_section(content, "engine")),
        machine={name: value for name, value in content.items() if name not in known},
        step_time=RegimeStepTime(
            **{kind: _regimes(_section(step_time, kind, "step_time."), kind) for kind in STEP_KINDS}
        ),
        coefficients=_coefficients(content, "coefficients"),
        cells=tuple(_cell(cell) for cell in content["cells"]),
        slowdown=Slowdown(factors=_section(content, "slowdown")),
        serving=ServingCost(**serving),
    )


def _section(content: Mapping[str, Any], name: str, inside: str = "") -> dict[str, Any]:
    value = content[name]
    if not isinstance(value, dict):
        raise ConfigError(f"{inside}{name} = {value!r}; use a table of its fields")
    return value


def _regimes(table: dict[str, Any], kind: str) -> Regimes:
    inside = f"step_time.{kind}."
    if type(table["boundary"]) is not int:
        raise ConfigError(f"{inside}boundary = {table['boundary']!r}; use a whole number of at least 0")
    return Regimes(
        small=_coefficients(table, "small", inside),
        large=_coefficients(table, "large", inside),
        boundary=table["boundary"],
    )


def _coefficients(content: Mapping[str, Any], name: str, inside: str = "") -> Coefficients:
    terms = _section(content, name, inside)
    for term, value in terms.items():
        if not _is_number(value) or not abs(value) <= MOST_S:
            raise ConfigError(
                f"{inside}{name}.{term} = {value!r}; use a number of seconds, at most {MOST_S:g}"
            )
    # By name: a term that is not there must not get the default of a router that knows nothing yet.
    found = Coefficients(**{term: terms[term] for term in Coefficients._fields})
    if unknown := terms.keys() - set(Coefficients._fields):
        raise ConfigError(f"{inside}{name} has {', '.join(sorted(unknown))}, which no step's time has")
    return found


def _table(regimes: Regimes) -> dict[str, Any]:
    return {
        "small": regimes.small._asdict(),
        "large": regimes.large._asdict(),
        "boundary": regimes.boundary,
    }


def _cell(cell: dict[str, Any]) -> CellReport:
    values = {name: value for name, value in cell.items() if name != "kind"}
    return CellReport(**{**values, "shape": StepShape(**_section(cell, "shape", "cells."))})
