"""Public request traces: where their files lie and what a row says.

Knows files and their formats; nothing of rates, models or prompts. Azure's traces (Patel et al., "Splitwise",
ISCA 2024) have arrival times and lengths; Mooncake's (Qin et al., FAST 2025) also have one hash id for each
512 tokens of the prompt, equal ids meaning an equal prefix.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from ...proto.errors import ConfigError

DATA_VARIABLE = "DIPHASE_DATA"
HASH_BLOCK_TOKENS = 512
"""Prompt tokens that one hash id of a Mooncake trace stands for."""

_AZURE = "https://github.com/Azure/AzurePublicDataset/tree/master/data"
_MOONCAKE = "https://github.com/kvcache-ai/Mooncake/tree/main/FAST25-release/traces"


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceRecord:
    """One request of a trace."""

    arrival_s: float
    """Since the trace's first request."""
    input_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...] = ()
    """Names of the prompt's blocks of HASH_BLOCK_TOKENS tokens; empty where the trace has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceFile:
    """A trace that can be asked for by name."""

    path: str
    """Below the data folder."""
    source: str
    """Where to get it."""


TRACES: Mapping[str, TraceFile] = {
    "azure-conv": TraceFile(path="azure2023/AzureLLMInferenceTrace_conv.csv", source=_AZURE),
    "azure-code": TraceFile(path="azure2023/AzureLLMInferenceTrace_code.csv", source=_AZURE),
    "mooncake-conversation": TraceFile(path="mooncake/conversation_trace.jsonl", source=_MOONCAKE),
    "mooncake-synthetic": TraceFile(path="mooncake/synthetic_trace.jsonl", source=_MOONCAKE),
}


def data_folder(option: str | None, environ: Mapping[str, str]) -> Path:
    """Where traces lie: the option, else DIPHASE_DATA, else `../shared/data` beside the repository."""
    given = option or environ.get(DATA_VARIABLE)
    if given:
        return Path(given)
    return Path(__file__).resolve().parents[3] / "shared" / "data"


def load_trace(name: str, folder: Path) -> list[TraceRecord]:
    """The records of the trace `name`, in order of arrival.

    Raises:
        ConfigError: no trace has that name; its file is missing (the message says where to get it); a row is
            malformed (the message names file and line).
    """
    if name not in TRACES:
        raise ConfigError(f"no trace is called {name!r}; use one of {', '.join(sorted(TRACES))}")
    trace = TRACES[name]
    path = folder / trace.path
    if not path.is_file():
        raise ConfigError(
            f"the trace {name} needs the file {path}; get {path.name} from {trace.source} and put it there, "
            f"or name the folder that has {trace.path} with --data or {DATA_VARIABLE}"
        )
    return read_mooncake(path) if path.suffix == ".jsonl" else read_azure(path)


def read_azure(path: Path) -> list[TraceRecord]:
    """A CSV with the columns TIMESTAMP, ContextTokens, GeneratedTokens.

    Raises:
        ConfigError: a column is missing or a value is malformed.
    """
    rows: list[tuple[datetime, int, int]] = []
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        try:
            for row in reader:
                # Seven digits of a second's fraction, of which datetime keeps six.
                at = datetime.fromisoformat(row["TIMESTAMP"])
                rows.append((at, int(row["ContextTokens"]), int(row["GeneratedTokens"])))
        except (KeyError, TypeError, ValueError) as exc:
            raise _malformed(path, reader.line_num, exc) from exc
    rows.sort(key=lambda row: row[0])
    return _checked(
        path,
        [
            TraceRecord(
                arrival_s=(at - rows[0][0]).total_seconds(), input_tokens=inputs, output_tokens=outputs
            )
            for at, inputs, outputs in rows
        ],
    )


def read_mooncake(path: Path) -> list[TraceRecord]:
    """JSON lines with timestamp (ms), input_length, output_length, hash_ids.

    Raises:
        ConfigError: a line is no JSON object, lacks a key or has a malformed value.
    """
    records: list[TraceRecord] = []
    with path.open(encoding="utf-8") as file:
        for line, text in enumerate(file, start=1):
            if not text.strip():
                continue
            try:
                row = json.loads(text)
                record = TraceRecord(
                    arrival_s=float(row["timestamp"]) / 1000.0,
                    input_tokens=int(row["input_length"]),
                    output_tokens=int(row["output_length"]),
                    hash_ids=tuple(int(i) for i in row["hash_ids"]),
                )
            except (KeyError, TypeError, ValueError) as exc:
                raise _malformed(path, line, exc) from exc
            records.append(record)
    records.sort(key=lambda record: record.arrival_s)
    return _checked(path, records)


def _checked(path: Path, records: list[TraceRecord]) -> list[TraceRecord]:
    if not records:
        raise ConfigError(f"the trace {path} has no requests; is the download complete?")
    return records


def _malformed(path: Path, line: int, exc: Exception) -> ConfigError:
    kind = f"no {exc}" if isinstance(exc, KeyError) else str(exc)
    return ConfigError(f"{path}, line {line} is malformed ({kind}); is the download complete?")
