"""What a file of requests says: CSV or JSON lines, with the field names of one of the public traces.

Every value is checked, for such a file may be anybody's log. Knows nothing of names of traces, rates, models
or prompts.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from ...proto.errors import ConfigError

HASH_BLOCK_TOKENS = 512
"""Prompt tokens that one hash id stands for."""
MAX_TOKENS = 10**9
"""Of one length; more is a slip."""
MAX_TICKS = 2**53
"""Times beyond it are no longer exact, nor times."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_WHOLE = re.compile(r"[+-]?[0-9]{1,18}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceRecord:
    """One request of a trace."""

    arrival_s: float | None
    """Since the trace's first request; None where the trace has lengths only, and then in all records."""
    input_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...] = ()
    """Names of the prompt's blocks of HASH_BLOCK_TOKENS tokens; empty where the trace has none."""


def read_trace(path: Path, *, sort: bool = False) -> list[TraceRecord]:
    """The requests of a file in order of time; its format is seen from the header or the first line.

    Args:
        sort: put the rows in order of time. Without it a time that goes backwards is an error: in a log it
            is a sign of clocks that disagree or of files that were joined.

    Raises:
        ConfigError: the file cannot be read or has no requests; a field is missing or unknown; a value is
            missing, not a number or out of range. The message names file, line and field.
    """
    text = _text(path)
    rows = _json_rows(text) if _is_json(path, text) else _csv_rows(text)
    times: list[float] = []
    records: list[TraceRecord] = []
    fields: _Fields | None = None
    line = 1
    try:
        for line, row in rows:
            fields = fields or _fields_of(row)
            fields.check(row, line)
            records.append(fields.record(row))
            if fields.time:
                times.append(fields.ticks(fields.time, row[fields.time]))
                if not sort and times[-1] < times[max(0, len(times) - 2)]:
                    raise _Malformed(
                        f"{fields.time} = {_shown(row[fields.time])} is before that of the row above; sort "
                        "the rows by it or correct it"
                    )
    except _Malformed as exc:
        raise ConfigError(f"{path}, line {exc.line or line} is malformed: {exc}") from exc
    if fields is None:
        raise ConfigError(f"the trace {path} has no requests; is the download complete?")
    return _in_time(records, times, fields.ticks_a_second) if times else records


def _in_time(records: list[TraceRecord], ticks: list[float], ticks_a_second: float) -> list[TraceRecord]:
    order = sorted(range(len(records)), key=ticks.__getitem__)
    start = ticks[order[0]]
    return [replace(records[i], arrival_s=(ticks[i] - start) / ticks_a_second) for i in order]


class _Malformed(ValueError):
    """What is wrong with a row, in words that follow the file's name and the line."""

    def __init__(self, problem: str, line: int | None = None) -> None:
        super().__init__(problem)
        self.line = line
        """None: that of the last row that was read."""


def _text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as exc:
        reason = getattr(exc, "strerror", None) or exc
        raise ConfigError(f"the trace {path} cannot be read: {reason}") from exc
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        line = content.count(b"\n", 0, exc.start) + 1
        raise ConfigError(f"{path}, line {line} is malformed: not UTF-8; save the file as that") from exc


def _is_json(path: Path, text: str) -> bool:
    suffix = path.suffix.lower()
    return suffix in {".jsonl", ".ndjson", ".json"} or (suffix != ".csv" and text.lstrip()[:1] == "{")


def _json_rows(text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, part in enumerate(text.split("\n"), start=1):
        if not part.strip():
            continue
        try:
            row = json.loads(part)
        except (ValueError, RecursionError) as exc:
            raise _Malformed(f"no JSON object ({exc}); is the file complete?", line) from exc
        if not isinstance(row, dict):
            raise _Malformed(f"{_shown(row)} is no JSON object; write one object a line", line)
        yield line, row


def _csv_rows(text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.reader(io.StringIO(text, newline=""))
    header: list[str] = []
    try:
        for values in reader:
            if not values:
                continue
            if not header:
                header = values
                if len(set(header)) < len(header):
                    raise _Malformed(f"a column stands twice in {_shown(header)}", reader.line_num)
                _fields_of(header).check({name: name for name in header}, reader.line_num)
                continue
            if len(values) > len(header):
                raise _Malformed(f"{len(values)} values for {len(header)} columns", reader.line_num)
            yield reader.line_num, dict(zip(header, values, strict=False))
    except csv.Error as exc:
        raise _Malformed(f"no CSV ({exc}); is the file complete?", reader.line_num) from exc


def _milliseconds(name: str, value: Any) -> float:
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = int(value) if _WHOLE.fullmatch(value) else float(value)
    # Written so that NaN is refused too.
    if type(value) not in {int, float} or not abs(value) <= MAX_TICKS:
        raise _Malformed(f"{name} = {_shown(value)} is no time in milliseconds; write a number")
    ticks: float = value
    return ticks


def _microseconds(name: str, value: Any) -> float:
    """Of a date, which counts as UTC when it names no zone."""
    try:
        # Azure's times have seven digits of a second's fraction, of which datetime keeps six.
        at = datetime.fromisoformat(value)
    except (TypeError, ValueError) as exc:
        raise _Malformed(
            f"{name} = {_shown(value)} is no time; write one such as 2023-11-16 18:15:46.680590"
        ) from exc
    return ((at if at.tzinfo else at.replace(tzinfo=UTC)) - _EPOCH) // _MICROSECOND


def _tokens(name: str, value: Any) -> int:
    if isinstance(value, str) and _WHOLE.fullmatch(value):
        value = int(value)
    if type(value) is not int or not 1 <= value <= MAX_TOKENS:
        raise _Malformed(f"{name} = {_shown(value)}; write a whole number of tokens from 1 to {MAX_TOKENS}")
    return value


def _hash_ids(name: str, value: Any, input_tokens: int) -> tuple[int, ...]:
    if isinstance(value, str):
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(value)
    if not isinstance(value, list) or not set(map(type, value)) <= {int}:
        raise _Malformed(f"{name} = {_shown(value)} is no list of whole numbers")
    if value and not 0 <= min(value) <= max(value) < 2**63:
        raise _Malformed(f"{name} has {min(value)} to {max(value)}; use numbers from 0 to 2^63 - 1")
    if len(value) > -(-input_tokens // HASH_BLOCK_TOKENS):
        raise _Malformed(
            f"{name} names {len(value)} blocks of {HASH_BLOCK_TOKENS} tokens, more than {input_tokens} tokens"
            " have; correct the ids or the length"
        )
    return tuple(value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fields:
    """The names of one format's columns or keys."""

    inputs: str
    outputs: str
    time: str = ""
    ticks: Callable[[str, Any], float] = _milliseconds
    """Reads a field of that name and value as a time since some moment."""
    ticks_a_second: float = 1e3
    hash_ids: str = ""
    """A file has it in every row or in none."""
    derived: tuple[str, ...] = ()
    """What follows from the lengths; not read."""

    @property
    def names(self) -> list[str]:
        return [name for name in (self.time, self.inputs, self.outputs, self.hash_ids) if name]

    def check(self, row: Mapping[str, Any], line: int) -> None:
        """Every field has a value and no other is there; a header is a row of its own names."""
        missing = [repr(name) for name in self.names if row.get(name) in (None, "")]
        unknown = [_shown(name) for name in row if name not in self.names and name not in self.derived]
        if unknown:
            known = "; or ".join(", ".join(fields.names) for fields in _FORMATS)
            lacks = f"no {', '.join(missing)}, " if missing else ""
            raise _Malformed(
                f"{lacks}unknown {', '.join(unknown)}; take out or rename what is not one of {known}", line
            )
        if missing:
            raise _Malformed(f"no {', '.join(missing)}; every row needs one", line)

    def record(self, row: Mapping[str, Any]) -> TraceRecord:
        """Without its time, which says something only beside that of others."""
        inputs = _tokens(self.inputs, row[self.inputs])
        return TraceRecord(
            arrival_s=None,
            input_tokens=inputs,
            output_tokens=_tokens(self.outputs, row[self.outputs]),
            hash_ids=_hash_ids(self.hash_ids, row[self.hash_ids], inputs) if self.hash_ids else (),
        )


_FORMATS = (
    _Fields(
        time="TIMESTAMP",
        ticks=_microseconds,
        ticks_a_second=1e6,
        inputs="ContextTokens",
        outputs="GeneratedTokens",
    ),
    _Fields(time="timestamp", inputs="input_length", outputs="output_length"),
    _Fields(time="timestamp", inputs="input_length", outputs="output_length", hash_ids="hash_ids"),
    _Fields(
        inputs="num_prefill_tokens",
        outputs="num_decode_tokens",
        derived=("num_total_tokens", "pd_ratio"),
    ),
    _Fields(inputs="prompt_tokens", outputs="output_tokens"),
)


def _fields_of(names: Collection[str]) -> _Fields:
    """The format that has most of `names`."""
    return max(_FORMATS, key=lambda fields: sum(name in names for name in fields.names))
